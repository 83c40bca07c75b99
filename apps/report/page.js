// Draws the charts: data from the page, colours from its style, one layer at a time where there are several.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figures").textContent);
  const config = { displayModeBar: false };
  const LEGEND_ROW = 20, LEGEND_MARK = 48, LEGEND_LETTER = 7.5, MARGINS = 80; // pixels

  const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();

  // A copy: plotly writes into the layout that it is given.
  function themed(figure, width) {
    const copy = structuredClone(figure.layout);
    const axis = { gridcolor: color("--grid"), zerolinecolor: color("--grid"), linecolor: color("--grid"), automargin: true };
    // as many columns as the longest entry allows: plotly cuts entries that are longer than their column
    const names = figure.data.filter((trace) => trace.showlegend !== false).map((trace) => trace.name);
    const column = LEGEND_MARK + LEGEND_LETTER * Math.max(...names.map((name) => name.length));
    const columns = Math.max(1, Math.min(3, names.length, Math.floor((width - MARGINS) / column)));
    const rows = Math.ceil(names.length / columns);
    copy.legend.entrywidth = 1 / columns;
    for (const name of ["xaxis", "yaxis"]) if (copy[name]?.title) copy[name].title.standoff = 8;
    return Object.assign(copy, {
      width,
      height: copy.height + LEGEND_ROW * rows,
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 13, color: color("--text") },
      hoverlabel: { bgcolor: color("--page"), bordercolor: color("--grid"), font: { color: color("--text") }, align: "left" },
      xaxis: Object.assign({}, axis, copy.xaxis),
      yaxis: Object.assign({}, axis, copy.yaxis),
    });
  }

  function draw(chart) {
    const named = figures[chart.dataset.figure];
    const control = document.querySelector(`input[data-controls="${chart.dataset.group}"]`);
    const figure = Array.isArray(named) ? named[control ? Number(control.value) : 0] : named;
    return Plotly.react(chart, structuredClone(figure.data), themed(figure, chart.clientWidth), config);
  }

  const charts = [...document.querySelectorAll(".chart")];
  const drawAll = () => Promise.all(charts.map(draw));

  for (const control of document.querySelectorAll("input[data-controls]")) {
    const labels = JSON.parse(control.dataset.labels);
    const output = document.getElementById(control.dataset.output);
    control.addEventListener("input", () => {
      output.textContent = labels[control.value];
      control.setAttribute("aria-valuetext", labels[control.value]);
      charts.filter((chart) => chart.dataset.group === control.dataset.controls).forEach(draw);
    });
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawAll);
  let pending = 0;
  addEventListener("resize", () => {
    cancelAnimationFrame(pending);
    pending = requestAnimationFrame(drawAll);
  });
  drawAll().then(() => document.documentElement.setAttribute("data-drawn", String(charts.length)));
})();
