// Draws the plots of a page: each `data-chart` holds its numbers.

import uPlot from "/static/vendor/uplot/uPlot.esm.js";

const drawn = new Map();

function color(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(name).trim();
}

// Ticks of the time axis as uPlot wants them: from how many seconds apart, what stands there, and what is added where
// a year, month, day, hour, minute or second begins.
const DAY = "\n{YYYY}-{MM}-{DD}";
const MINUTE = `${DAY} {HH}:{mm}`;
const TIMES = [
  [31_536_000, "{YYYY}", null, null, null, null, null, null, 1],
  [86_400, "{MM}-{DD}", "\n{YYYY}", null, null, null, null, null, 1],
  [60, "{HH}:{mm}", DAY, null, DAY, null, null, null, 1],
  [1, ":{ss}", MINUTE, null, MINUTE, null, "\n{HH}:{mm}", null, 1],
  [0.001, ":{ss}.{fff}", MINUTE, null, MINUTE, null, "\n{HH}:{mm}", null, 1],
];

function options(element, chart) {
  const dim = color("--dim");
  const axis = { stroke: dim, grid: { stroke: color("--line"), width: 1 }, ticks: { stroke: color("--line"), width: 1 }, font: "12px system-ui, sans-serif" };
  const number = (value) => (value == null ? "–" : `${+value.toPrecision(5)} ${chart.unit}`.trim());
  return {
    width: Math.max(200, element.clientWidth),
    height: 210,
    scales: { x: { time: chart.time }, y: { range: (_, low, high) => (chart.unit ? [0, high || 1] : uPlot.rangeNum(low, high, 0.1, true)) } },
    tzDate: (seconds) => uPlot.tzDate(new Date(seconds * 1000), "Etc/UTC"),
    axes: [{ ...axis, values: TIMES, space: 80 }, { ...axis, size: 58 }],
    cursor: { drag: { x: true, y: false } },
    series: [
      { label: "Time", value: "{YYYY}-{MM}-{DD} {HH}:{mm}:{ss}" },
      ...chart.series.map((label, place) => ({
        label,
        stroke: color(`--series-${1 + (place % 6)}`),
        width: 1.5,
        spanGaps: true,
        points: { show: chart.x.length < 60, size: 4 },
        paths: chart.steps ? uPlot.paths.stepped({ align: 1 }) : undefined,
        value: (_, value) => number(value),
      })),
    ],
  };
}

function draw(element) {
  const text = element.dataset.chart;
  const before = drawn.get(element);
  if (before?.text === text && before.width === element.clientWidth) return;
  const chart = JSON.parse(text);
  const data = [chart.x, ...chart.values];
  const names = JSON.stringify(chart.series);
  if (before && before.names === names) {
    if (before.width !== element.clientWidth) before.plot.setSize({ width: Math.max(200, element.clientWidth), height: 210 });
    before.plot.setData(data);
    drawn.set(element, { ...before, text, width: element.clientWidth });
    return;
  }
  before?.plot.destroy();
  drawn.set(element, { plot: new uPlot(options(element, chart), data, element), text, names, width: element.clientWidth });
}

export function drawAll() {
  for (const [element, { plot }] of drawn) {
    if (!element.isConnected) {
      plot.destroy();
      drawn.delete(element);
    }
  }
  document.querySelectorAll("[data-chart]").forEach(draw);
}

function drawAnew() {
  for (const { plot } of drawn.values()) plot.destroy();
  drawn.clear();
  drawAll();
}

matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAnew);
let resizing;
addEventListener("resize", () => {
  clearTimeout(resizing);
  resizing = setTimeout(drawAll, 150);
});
