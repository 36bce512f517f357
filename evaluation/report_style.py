"""How a report looks: on a screen of any width, and in print."""

STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%}
body{margin:0 auto;padding:20px 16px 48px;max-width:1240px;background:#fff;color:#1a1a1a;
font:16px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
header,aside,main{overflow-wrap:anywhere}
h1,h2,h3,h4{line-height:1.25}
h1{font-size:1.7rem;margin:0 0 .3em}
h2{font-size:1.25rem;margin:2.2em 0 .6em;padding-bottom:.25em;border-bottom:1px solid #ccc}
h3{font-size:1.05rem;margin:1.6em 0 .5em}
h4{font-size:.95rem;margin:1em 0 .4em}
p{max-width:48em;margin:.5em 0}
ul{padding-left:1.3em}
a{color:#00518a}
code{font:0.9em ui-monospace,"SFMono-Regular",Consolas,"Liberation Mono",monospace}
nav ul{display:flex;flex-wrap:wrap;gap:.25em 1.1em;list-style:none;margin:1em 0;padding:0}
.warnings{margin:1em 0;padding:.6em 1em;border:1px solid #b35900;border-left-width:6px;border-radius:3px;
background:#fff8ef}
.warnings h2{margin:0;padding:0;border:0;font-size:1rem}
.warnings ul{margin:.3em 0}
.scroll{position:relative;overflow-x:auto;width:fit-content;max-width:100%;margin:.8em 0;
border:1px solid #ddd;border-radius:3px}
.scroll:focus-visible{outline:2px solid #00518a}
table{border-collapse:collapse;font-size:.875rem;overflow-wrap:break-word}
th,td{padding:.35em .65em;text-align:left;vertical-align:top;border-bottom:1px solid #e6e6e6;
min-width:3.2em;max-width:22em}
thead th{background:#f4f4f4;border-bottom:1px solid #bbb;vertical-align:bottom}
tbody th{position:sticky;left:0;background:#fff;font-weight:500;min-width:min(15em,32vw);max-width:min(22em,42vw);
overflow-wrap:anywhere;border-right:1px solid #e6e6e6}
thead th:first-child{position:sticky;left:0;border-right:1px solid #ddd}
tbody tr:last-child>*{border-bottom:0}
.num{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}
thead .num{white-space:normal}
tr.member>*{color:#555;font-size:.94em}
tr.member th{padding-left:1.5em;font-weight:400}
td b{font-weight:700}
.long{overflow-wrap:anywhere}
td.long{min-width:15em}
.hidden{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,340px),1fr));gap:1.2em 1.6em;
align-items:start}
.chart{margin:0;max-width:460px;break-inside:avoid}
.chart figcaption{font-weight:600;font-size:.9rem;margin-bottom:.2em}
.chart svg{display:block;width:100%;height:auto}
.chart text{font:12px system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.2em 1.2em;margin:.5em 0 .8em;padding:0;font-size:.875rem}
.legend li{display:flex;align-items:center;gap:.4em;min-width:0}
.legend svg{width:30px;height:12px;flex:none}
details{margin:.8em 0}
summary{cursor:pointer;font-weight:600;font-size:.95rem}
.gallery{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,300px),1fr));gap:1em}
.gallery figure{margin:0;break-inside:avoid}
.gallery img{display:block;max-width:100%;height:auto}
.gallery figcaption{font-size:.8rem;margin-top:.25em}
@media print{
@page{margin:14mm}
body{padding:0;max-width:none;font-size:10.5pt}
nav{display:none}
h2,h3,h4,summary,.legend{break-after:avoid}
section{break-inside:auto}
.scroll{overflow:visible;border:0}
table{font-size:7.5pt}
thead{display:table-header-group}
tr{break-inside:avoid}
th,td{padding:.2em .35em;min-width:0}
.wide{font-size:7pt}
.wide thead .num{writing-mode:vertical-rl;writing-mode:sideways-lr;white-space:nowrap}
.wide th,.wide td{padding:.2em .25em}
tbody th{position:static;min-width:5em;max-width:none}
.long,td.long{min-width:9em}
.wide .long{min-width:6em}
thead th:first-child{position:static}
.num{white-space:normal}
.charts{grid-template-columns:1fr 1fr}
.gallery{grid-template-columns:1fr 1fr 1fr}
.warnings{break-inside:avoid}
details::details-content{content-visibility:visible;block-size:auto}
}
"""
