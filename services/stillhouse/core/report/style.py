"""How the report looks."""

from typing import Final

STYLE: Final = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1c2024;--dim:#667079;--line:#e3e6e9;--card:#f7f8f9;--good:#187a3d;
--bad:#b3261e;--c0:#2f6fdb;--c1:#d9730d;--c2:#2a9d5c;--c3:#a34bc4;--c4:#c43f5e;--c5:#3d9fb0}
@media(prefers-color-scheme:dark){:root{--bg:#14171a;--fg:#e6e9ec;--dim:#98a2ab;--line:#2c3237;--card:#1b1f23;
--good:#5fcf8a;--bad:#ff8a80;--c0:#7aa7f7;--c1:#f0a35c;--c2:#67cf95;--c3:#cf93e6;--c4:#f08aa2;--c5:#74cbd9}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:1080px;padding:28px 20px 60px;background:var(--bg);color:var(--fg);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}h1{font-size:26px;line-height:1.25;margin:0 0 4px}
h2{font-size:18px;margin:36px 0 10px;padding-top:12px;border-top:1px solid var(--line)}
p.lead{font-size:17px;margin:10px 0}small,.dim{color:var(--dim)}
.badge{display:inline-block;padding:1px 10px;border-radius:99px;font-size:13px;border:1px solid currentColor;
vertical-align:middle}.succeeded{color:var(--good)}.failed{color:var(--bad)}table{border-collapse:collapse;width:100%}
th,td{text-align:left;padding:6px 12px 6px 0;border-bottom:1px solid var(--line);vertical-align:top}
th{font-weight:600;color:var(--dim);font-size:13px}td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.good{color:var(--good)}.bad{color:var(--bad)}
.grid{display:grid;grid-template-columns:repeat(auto-fill,minmax(310px,1fr));gap:16px}
figure{margin:0;background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 10px 6px;
break-inside:avoid}figcaption{font-weight:600;font-size:14px;padding-left:4px}figcaption small{font-weight:400}
svg{width:100%;height:auto;display:block}.g{stroke:var(--line)}.t{fill:var(--dim);font-size:11px}
.l{fill:none;stroke-width:1.8;stroke-linejoin:round}.c0{stroke:var(--c0);--c:var(--c0)}
.c1{stroke:var(--c1);--c:var(--c1)}.c2{stroke:var(--c2);--c:var(--c2)}.c3{stroke:var(--c3);--c:var(--c3)}
.c4{stroke:var(--c4);--c:var(--c4)}.c5{stroke:var(--c5);--c:var(--c5)}.d{fill:var(--c)}
.legend{display:flex;flex-wrap:wrap;gap:2px 14px;font-size:12px;color:var(--dim);padding:2px 4px}
.legend i{display:inline-block;width:14px;height:3px;margin-right:5px;vertical-align:middle;background:var(--c)}
.text{white-space:pre-wrap;overflow-wrap:anywhere}
.trio{display:grid;grid-template-columns:repeat(auto-fit,minmax(240px,1fr));gap:10px}
.trio>div,.card{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:10px 12px}
.trio b{display:block;font-size:12px;color:var(--dim);font-weight:600;margin-bottom:4px}
.prompt{margin:18px 0 8px;font-weight:600}
pre{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:12px;overflow:auto;font-size:13px}
ul{padding-left:20px;margin:6px 0}li{margin:3px 0;overflow-wrap:anywhere}
details summary{cursor:pointer;color:var(--dim)}@media print{body{max-width:none;padding:0;font-size:12px}
details{display:none}.grid{grid-template-columns:1fr 1fr}}
"""
