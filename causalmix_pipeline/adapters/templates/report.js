"use strict";
(function () {
  var root = document.documentElement;
  root.classList.add("js");

  // The theme: the system's until the button is pressed, then kept for this page.
  var button = document.getElementById("theme");
  var dark = window.matchMedia("(prefers-color-scheme: dark)");
  function kept(value) {
    try {
      if (value) sessionStorage.setItem("theme", value);
      return sessionStorage.getItem("theme");
    } catch (error) {
      return null; // storage is forbidden: the choice lasts until the page is left
    }
  }
  function isDark() {
    return root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
  }
  function name() {
    button.textContent = isDark() ? "Light" : "Dark";
  }
  if (kept()) root.dataset.theme = kept();
  button.addEventListener("click", function () {
    root.dataset.theme = isDark() ? "light" : "dark";
    kept(root.dataset.theme);
    name();
  });
  dark.addEventListener("change", name);
  name();

  // Other task weights: the mixture computed for the nearest of them.
  var held = document.getElementById("what-if");
  if (!held) return;
  var known = JSON.parse(held.textContent);
  var box = document.getElementById("sliders");
  var sliders = Array.prototype.slice.call(box.querySelectorAll("input"));
  // What the page came with is of the weights of the settings, which is the first row.
  var texts = Array.prototype.slice.call(box.querySelectorAll("b, #total-ends"));
  var own = texts.map(function (place) { return place.textContent; });

  function signed(value) {
    if (value === null) return "\u2013";
    return (value < 0 ? "\u2212" : "+") + Math.abs(value).toFixed(3);
  }
  function share(value) {
    var percent = 100 * value;
    return percent.toFixed(percent < 9.95 ? 1 : 0) + "%";
  }
  function place(axis, value) {
    var part = (value - axis[0]) / (axis[1] - axis[0]);
    return 100 * Math.min(Math.max(part, 0), 1) + "%";
  }
  function isAtStart() {
    // Positions are whole percents, and the weights of the settings may lie between them.
    return sliders.every(function (slider) { return slider.value === slider.defaultValue; });
  }
  function asked() {
    var values = sliders.map(function (slider) { return Number(slider.value); });
    var sum = values.reduce(function (a, b) { return a + b; }, 0);
    return values.map(function (value) { return sum ? value / sum : 1 / values.length; });
  }
  function weightsOf(row) {
    var values = known.moved.map(function (t) { return known.weights[row][t]; });
    var sum = values.reduce(function (a, b) { return a + b; }, 0);
    return values.map(function (value) { return value / sum; });
  }
  function nearest(wanted) {
    var best = 0, least = Infinity;
    for (var row = 0; row < known.weights.length; row++) {
      var distance = weightsOf(row).reduce(function (total, weight, i) {
        return total + Math.pow(weight - wanted[i], 2);
      }, 0);
      if (distance < least - 1e-12) { best = row; least = distance; }
    }
    return best;
  }
  function showMixture(row) {
    box.querySelectorAll("[data-domain]").forEach(function (line, i) {
      var d = known.order[i], now = known.mixtures[row][d];
      var change = 100 * (now - known.mixtures[0][d]);
      line.querySelector(".now").setAttribute("width", place(known.shares, now));
      line.querySelector("b").textContent = share(now);
      line.querySelector("small").textContent = Math.abs(change) < 0.05 ? ""
        : (change < 0 ? "\u2212" : "+") + Math.abs(change).toFixed(1);
    });
  }
  function showGains(row) {
    box.querySelectorAll("[data-task]").forEach(function (line, t) {
      var gain = known.gains[row][t];
      var low = gain[1] === null ? gain[0] : gain[1], high = gain[2] === null ? gain[0] : gain[2];
      line.querySelector("circle").setAttribute("cx", place(known.axis, gain[0]));
      line.querySelector(".whisker").setAttribute("x1", place(known.axis, low));
      line.querySelector(".whisker").setAttribute("x2", place(known.axis, high));
      line.querySelector("b").textContent = signed(gain[0]);
    });
    var total = known.totals[row];
    document.getElementById("total").textContent = signed(total[0]);
    document.getElementById("total-ends").textContent = total[1] === null ? "no interval"
      : "90% interval " + signed(total[1]) + " to " + signed(total[2]);
  }
  function show(row) {
    showMixture(row);
    showGains(row);
    if (row === 0) texts.forEach(function (place, i) { place.textContent = own[i]; });
    var told = known.moved.map(function (t, i) {
      var task = known.tasks[t].length > 40 ? known.tasks[t].slice(0, 39) + "\u2026" : known.tasks[t];
      // Marks that isolate a name whose letters run from right to left.
      return "\u2068" + task + "\u2069 " + share(weightsOf(row)[i]);
    });
    document.getElementById("picked").textContent = row === 0
      ? "Shown: the recommended mixture, for the weights of the settings."
      : "Shown: the precomputed mixture for " + told.join(", ") + ".";
  }
  function update() {
    var wanted = isAtStart() ? weightsOf(0) : asked();
    sliders.forEach(function (slider, i) {
      slider.nextElementSibling.textContent = share(wanted[i]);
      slider.setAttribute("aria-valuetext", share(wanted[i]));
    });
    show(isAtStart() ? 0 : nearest(wanted));
  }
  sliders.forEach(function (slider) { slider.addEventListener("input", update); });
  document.getElementById("reset").addEventListener("click", function () {
    sliders.forEach(function (slider) { slider.value = slider.defaultValue; });
    update();
  });
  // A page that is opened again may keep where the sliders stood.
  update();
})();
