// What the page does by itself: keys on the grid and the token strip, the cursor, theme, widths. No value from here is trusted by the server.
(function () {
  "use strict";
  const set = (id, data) => window.dash_clientside.set_props(id, { data });
  const root = document.documentElement;
  let cursor = null, toggles = 0, refocus = false;

  // -- grid ---------------------------------------------------------------------------------------------------------

  const plot = (id) => document.querySelector("#" + id + " .js-plotly-plot");
  const parse = (text) => { const m = /^L(\d+)([HKE])(\d+)$/.exec(text || ""); return m ? [+m[1], +m[3], m[2]] : null; };
  const LETTER = { head: "H", kv: "K", expert: "E" };

  function draw() {
    const gd = plot("grid"), meta = gd && gd.layout && gd.layout.meta;
    if (!meta || !meta.kind || !cursor || !window.Plotly) return;
    const inside = cursor[0] < meta.layers && cursor[1] < meta.units;
    const [x, y] = meta.upright ? [cursor[1], cursor[0]] : [cursor[0], cursor[1]];
    const key = inside ? x + "," + y : "";
    const old = (gd.layout.shapes || [])[0];
    if (old ? old.name === key : !inside) return;
    const shape = { type: "rect", x0: x - 0.5, x1: x + 0.5, y0: y - 0.5, y1: y + 0.5, name: key,
      line: { color: "#e0457b", width: 3 } };
    window.Plotly.relayout(gd, { shapes: inside ? [shape] : [] });
  }

  function place(layer, unit, kind) {
    cursor = [layer, unit];
    const address = "L" + layer + LETTER[kind] + unit;
    draw();
    return address;
  }

  function onGridKey(event) {
    const gd = plot("grid"), meta = gd && gd.layout && gd.layout.meta;
    if (!meta || !meta.kind || event.ctrlKey || event.metaKey || event.altKey) return;
    const at = cursor || [0, 0];
    const steps = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
    const limit = (value, count) => Math.min(Math.max(value, 0), count - 1);
    if (steps[event.key]) {
      let [dx, dy] = steps[event.key];
      if (meta.upright) [dx, dy] = [dy, dx];
      const next = cursor ? [at[0] + dx, at[1] + dy] : at;
      set("cursor", place(limit(next[0], meta.layers), limit(next[1], meta.units), meta.kind));
    } else if (event.key === "Home" || event.key === "End") {
      set("cursor", place(event.key === "Home" ? 0 : meta.layers - 1, at[1], meta.kind));
    } else if (event.key === "Enter") {
      set("open", place(at[0], at[1], meta.kind));
    } else if (event.key === " ") {
      toggles += 1;
      set("toggle", { unit: place(at[0], at[1], meta.kind), n: toggles });
    } else return;
    event.preventDefault();
  }

  // -- tokens -------------------------------------------------------------------------------------------------------

  function choose(button) {
    refocus = true;
    set("query", +button.dataset.place);
  }

  function onTokenKey(event, button) {
    const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (!step) return;
    const next = document.querySelector('.token[data-place="' + (+button.dataset.place + step) + '"]');
    if (next) choose(next);
    event.preventDefault();
  }

  document.addEventListener("keydown", (event) => {
    const target = event.target;
    if (target.id === "grid-box") return onGridKey(event);
    if (target.classList && target.classList.contains("token")) return onTokenKey(event, target);
  });

  document.addEventListener("click", (event) => {
    const chip = event.target.closest && event.target.closest("[data-unit]");
    if (chip) {
      const unit = parse(chip.dataset.unit);
      if (unit) { cursor = [unit[0], unit[1]]; draw(); }
      set("open", chip.dataset.unit);
      if (!chip.closest("#view-heads")) show("heads");
    }
    const token = event.target.closest && event.target.closest(".token");
    if (token) choose(token);
  });

  function show(name) {
    window.dash_clientside.set_props("view", { value: name });
  }

  // after every change of the page: the cursor is where it was, the chosen token has the focus, clicks move the cursor
  new MutationObserver(() => {
    const gd = plot("grid");
    if (gd && gd.on && !gd.headwise) {
      gd.headwise = true;
      gd.on("plotly_click", (data) => {
        const unit = parse(data.points[0] && data.points[0].customdata);
        if (unit) { cursor = [unit[0], unit[1]]; draw(); }
      });
      gd.on("plotly_afterplot", draw);
    }
    if (refocus) {
      const chosen = document.querySelector('.token[aria-selected="true"]');
      if (chosen && chosen !== document.activeElement) { refocus = false; chosen.focus(); }
    }
  }).observe(document, { childList: true, subtree: true, attributes: true, attributeFilter: ["aria-selected", "class"] });

  // -- theme and width ----------------------------------------------------------------------------------------------

  const remembered = () => { try { return localStorage.getItem("headwise-theme"); } catch (error) { return null; } };
  const dark = () => matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = remembered() || (dark() ? "dark" : "light");

  const small = matchMedia("(max-width: 700px)");
  small.addEventListener("change", () => set("narrow", small.matches));

  window.dash_clientside = Object.assign({}, window.dash_clientside, {
    headwise: {
      show: (view) => {
        setTimeout(() => window.dispatchEvent(new Event("resize")), 30);
        return ["heads", "compare", "budget", "files"].map((name) => name !== view);
      },
      narrow: () => small.matches,
      theme: (clicks) => {
        if (clicks) {
          root.dataset.theme = root.dataset.theme === "dark" ? "light" : "dark";
          try { localStorage.setItem("headwise-theme", root.dataset.theme); } catch (error) { /* private windows */ }
        }
        return "the page is " + root.dataset.theme;
      },
    },
  });
})();
