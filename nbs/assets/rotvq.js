/* The figures that move: the estimators' formulas in the plane, and scenes to drag by mouse, touch or keyboard.
   A page carries <div class="rotvq-explorable" data-scene="…" data-start="{…}"> with a still picture inside, which stays
   where this script does not run. Needs nothing else. Formulas and scenes are checked against the Python package. */
(function () {
  "use strict";
  if (window.rotvq) return;

  const RULE = "rotation-until-used";
  const COLORS = { ste: "#E69F00", rotation: "#0072B2", [RULE]: "#882255", reflection: "#CC79A7" };
  const NAMES = { ste: "straight-through", rotation: "rotation", [RULE]: "rotation until used", reflection: "reflection" };
  const BECOMES = { ste: "copied", rotation: "rotated", reflection: "mirrored" };
  const dot = (u, v) => u[0] * v[0] + u[1] * v[1];
  const norm = (v) => Math.sqrt(dot(v, v));
  const add = (u, v, k = 1) => [u[0] + k * v[0], u[1] + k * v[1]];
  const scale = (v, k) => [k * v[0], k * v[1]];
  const unit = (v) => { const n = norm(v); return n > 0 ? scale(v, 1 / n) : [0, 0]; };
  const angle = (u, v) => !(norm(u) > 0 && norm(v) > 0) ? NaN : (Math.acos(Math.max(-1, Math.min(1, dot(unit(u), unit(v))))) * 180) / Math.PI;
  /* From u to v, counterclockwise, in degrees below 360. */
  const turned = (u, v) => (((Math.atan2(v[1], v[0]) - Math.atan2(u[1], u[0])) * 180) / Math.PI + 720) % 360;
  const reflect = (u, v) => (norm(v) > 0 ? add(u, unit(v), -2 * dot(u, unit(v))) : u);
  const rounding = (r) => (norm(r) > 1e-12 ? r : [0, 0]);

  /* Gradient at z for the gradient g at q; `ratio` multiplies what is turned, the length ratio of q and z unless given;
     `weight` is that of the rotation under the rule. */
  function carried(mirrored, z, q, g, ratio) {
    const defined = norm(z) > 0 && norm(q) > 0;
    if (ratio === undefined) ratio = defined ? norm(q) / norm(z) : 1;
    if (!defined) return scale(g, ratio);
    const zh = unit(z), qh = unit(q);
    if (mirrored) return scale(reflect(g, rounding(add(zh, qh, -1))), ratio);
    const back = reflect(g, rounding(add(zh, qh)));
    return scale(add(back, zh, 2 * dot(qh, g)), ratio);
  }
  const gradients = {
    ste: (z, q, g) => g,
    rotation: (z, q, g, ratio) => carried(false, z, q, g, ratio),
    [RULE]: (z, q, g, ratio, weight = 1) => add(scale(carried(false, z, q, g, ratio), weight), g, 1 - weight),
    reflection: (z, q, g, ratio) => carried(true, z, q, g, ratio),
  };
  function nearest(z, codes) {
    let best = 0, least = Infinity;
    for (let i = 0; i < codes.length; i++) {
      const a = z[0] - codes[i][0], b = z[1] - codes[i][1], far = a * a + b * b;
      if (far < least) [best, least] = [i, far];
    }
    return best;
  }

  /* The cell of codes[k] within a box: the box cut by the line halfway to every other code. */
  function cell(k, codes, limit) {
    let corners = [[-limit, -limit], [limit, -limit], [limit, limit], [-limit, limit]];
    codes.forEach((other, j) => {
      if (j === k) return;
      const normal = add(other, codes[k], -1), level = (dot(other, other) - dot(codes[k], codes[k])) / 2;
      const kept = [];
      corners.forEach((a, i) => {
        const b = corners[(i + 1) % corners.length], sa = dot(a, normal) - level, sb = dot(b, normal) - level;
        if (sa <= 0) kept.push(a);
        if (sa * sb < 0) kept.push(add(a, add(b, a, -1), sa / (sa - sb)));
      });
      corners = kept;
    });
    return corners;
  }

  const CODES = [[-1.3, 0.8], [-1, -0.9], [0.1, 1.2], [0.2, -0.3], [1.4, 0.9], [1.2, -1.1]];
  const POINTS = [
    [-1.2, 1.1], [-1.4, 1], [-0.8, 1.1], [-0.6, 0.6], [-1.2, 0.6], [-1.5, 0.8], [-1.1, 1.1], [-1, 1.7], [-0.9, 0.3],
    [1.3, 0.5], [1, 1.2], [1.1, 0], [1.3, 0.6], [0.8, 0.3], [1, 0.7], [1.2, 0.9], [1.9, 0.4], [0.9, 0.6],
    [0.5, -1.5], [0.6, -1.7], [-0.3, -1.2], [-0.2, -1.4], [0.3, -0.9], [0.1, -1.3], [0.6, -1], [0, -0.7], [-0.2, -1.1]];
  const PALETTE = ["#009E73", "#D55E00", "#56B4E9"];
  const ratio = (q, z) => (norm(z) > 0 && norm(q) > 0 ? norm(q) / norm(z) : 1);
  const signed = (x) => x.toFixed(2).replace("-", "−");
  const degrees = (x) => (Number.isNaN(x) ? "none" : Math.round(x) + "°");
  const away = (x) => (Math.abs(x) < 1e-9 ? "keeps its distance" : x > 0 ? "comes closer" : "goes away");

  /* A scene: which points can be dragged (name, the point it hangs on, label), what they draw and say, and the lower edge of its window. */
  function gradientScene(estimators) {
    return {
      low: -1.1,
      points: { z: { label: "z" }, q: { label: "q" }, g: { label: "g", on: "q" } },
      draw(p, paint) {
        paint.arrow([0, 0], p.z, "#7f7f7f", "z");
        paint.arrow([0, 0], p.q, "#7f7f7f", "q");
        paint.arrow(p.q, p.g, "#000", "g");
        paint.arc(p.q, p.q, p.g, "#000");
        const lines = [`θ = ${degrees(angle(p.z, p.q))}, λ = ${ratio(p.q, p.z).toFixed(2)}; angle of q and g: ${degrees(angle(p.q, p.g))}`];
        const grads = {};
        estimators.forEach((name) => {
          grads[name] = gradients[name](p.z, p.q, p.g);
          paint.arrow(p.z, grads[name], COLORS[name]);
          paint.tip(add(p.z, grads[name]), grads[name], BECOMES[name], COLORS[name]);
          if (name !== "ste") paint.arc(p.z, p.z, grads[name], COLORS[name]);
          lines.push([`angle of z and its gradient, ${NAMES[name]}: ${degrees(angle(p.z, grads[name]))}`, COLORS[name]]);
        });
        return { grads, lines };
      },
    };
  }
  const scenes = {
    rotation: gradientScene(["ste", "rotation"]),
    mirror: {
      ...gradientScene([]),
      draw(p, paint) {
        const drawn = gradientScene(["rotation", "reflection"]).draw(p, paint);
        const way = add(unit(p.q), unit(p.z), -1);
        drawn.lines.push(`with the step −g, measured along ẑ − q̂: q ${away(dot(p.g, way))}`);
        ["rotation", "reflection"].forEach((name) => drawn.lines.push([`z under ${NAMES[name]} ${away(-dot(drawn.grads[name], way))}`, COLORS[name]]));
        return drawn;
      },
    },
    origin: {
      low: -1.1,
      points: { o: { label: "origin" }, z: { label: "z" }, q: { label: "q" }, g: { label: "g", on: "q" } },
      draw(p, paint) {
        const z = add(p.z, p.o, -1), q = add(p.q, p.o, -1), grads = {};
        paint.arrow(p.o, z, "#7f7f7f", "z");
        paint.arrow(p.o, q, "#7f7f7f", "q");
        paint.arrow(p.q, p.g, "#000", "g");
        ["ste", "rotation"].forEach((name) => paint.arrow(p.z, (grads[name] = gradients[name](z, q, p.g)), COLORS[name]));
        return { grads, lines: [`seen from the origin: θ = ${degrees(angle(z, q))}, λ = ${ratio(q, z).toFixed(2)}`,
          [`length of the gradient, straight-through: ${norm(grads.ste).toFixed(2)}`, COLORS.ste],
          [`rotation: ${norm(grads.rotation).toFixed(2)}, turned by ${degrees(angle(p.g, grads.rotation))}`, COLORS.rotation]] };
      },
    },
    mirrors: {
      points: { a: { label: "a" }, b: { label: "b" } },
      draw(p, paint) {
        const half = add(unit(p.a), unit(p.b)), first = reflect(p.a, half), second = reflect(first, p.b);
        paint.mirror(half);
        paint.mirror(p.b);
        paint.arrow([0, 0], first, "#D55E00", "a′");
        paint.band([0, 0], second, "#009E73", "a″");
        paint.arrow([0, 0], p.a, "#7f7f7f", "a");
        paint.arrow([0, 0], p.b, "#7f7f7f", "b");
        return { images: { first, second }, lines: [`from a to b: ${degrees(angle(p.a, p.b))}; between the normals: ${degrees(angle(half, p.b))}`,
          [`from a to its second image a″: ${degrees(angle(p.a, second))}`, "#009E73"]] };
      },
    },
    twice: {
      points: { m: { label: "along the first mirror" }, n: { label: "along the second mirror" }, u: { label: "u" } },
      draw(p, paint) {
        const across = (v) => [-v[1], v[0]], first = reflect(p.u, across(p.m)), second = reflect(first, across(p.n));
        paint.mirror(across(p.m));
        paint.mirror(across(p.n));
        paint.arrow([0, 0], p.u, "#7f7f7f", "u");
        paint.arrow([0, 0], first, "#D55E00", "u′");
        paint.arrow([0, 0], second, "#009E73", "u″");
        paint.turn(p.m, p.n, "#666", 0.45);
        paint.turn(p.u, second, "#009E73", 0.75);
        return { images: { first, second }, lines: [`from the first mirror to the second: ${Math.round(turned(p.m, p.n))}°`,
          [`from u to its second image u″: ${Math.round(turned(p.u, second))}°`, "#009E73"]] };
      },
    },
    means: {
      points: { a: { label: "code 0" }, b: { label: "code 1" }, c: { label: "code 2" } },
      draw(p, paint) {
        const codes = [p.a, p.b, p.c], of = POINTS.map((point) => nearest(point, codes)), means = [];
        codes.forEach((c, k) => paint.polygon(cell(k, codes, LIMIT), "none"));
        POINTS.forEach((point, i) => paint.dot(point, PALETTE[of[i]]));
        codes.forEach((c, k) => {
          const mine = POINTS.filter((point, i) => of[i] === k);
          means.push(mine.length ? scale(mine.reduce((sum, point) => add(sum, point)), 1 / mine.length) : c);
          paint.arrow(c, add(means[k], c, -1), "#000");
        });
        const loss = POINTS.reduce((sum, point, i) => sum + norm(add(point, codes[of[i]], -1)) ** 2, 0) / POINTS.length;
        const counts = codes.map((c, k) => of.filter((i) => i === k).length);
        return { means, loss, lines: [`mean squared distance of the points from their codes: ${loss.toFixed(3)}`,
          ...counts.map((count, k) => [`code ${k}: ${count} points`, PALETTE[k]])] };
      },
    },
    lookup: {
      points: { z: { label: "z" }, t: { label: "t, the target" } },
      draw(p, paint) {
        const k = nearest(p.z, CODES), q = CODES[k], g = add(q, p.t, -1);
        CODES.forEach((c, i) => { paint.polygon(cell(i, CODES, LIMIT), i === k ? "#eef4f8" : "none"); paint.cross(c); });
        paint.arrow(q, scale(g, -0.4), "#000", "−0.4 g");
        paint.arrow(p.z, scale(g, -0.4), COLORS.ste);
        paint.name(p.z, "z");
        paint.name(p.t, "t");
        return { grads: { ste: g }, code: k, lines: [`code ${k}; loss ½‖q − t‖² = ${(dot(g, g) / 2).toFixed(2)}`,
          "true gradient at z: 0", [`straight-through gradient: (${signed(g[0])}, ${signed(g[1])})`, COLORS.ste]] };
      },
    },
  };

  const LIMIT = 2.2, SIZE = 440, SVG = "http://www.w3.org/2000/svg";
  const px = (v) => [((v[0] + LIMIT) / (2 * LIMIT)) * SIZE, ((LIMIT - v[1]) / (2 * LIMIT)) * SIZE];
  function make(kind, attributes, parent, text) {
    const element = document.createElementNS(SVG, kind);
    for (const key in attributes) element.setAttribute(key, attributes[key]);
    if (text !== undefined) element.textContent = text;
    if (parent) parent.appendChild(element);
    return element;
  }
  function painter(layer) {
    const line = (a, b, more) => { const [x1, y1] = px(a), [x2, y2] = px(b); make("line", { x1, y1, x2, y2, ...more }, layer); };
    const word = ([x, y], text, fill) => make("text", { x, y, fill, "text-anchor": "middle", "dominant-baseline": "middle", "font-style": "italic", "font-size": 16 }, layer, text);
    return {
      name(at, text) { const [x, y] = px(at); word([x + 14, y - 12], text, "#333"); },
      /* Beyond the tip of an arrow, within the figure. */
      tip(at, v, text, fill) {
        const [x, y] = px(at), u = unit(v), inside = Math.max(36, Math.min(SIZE - 36, x + 30 * u[0]));
        make("text", { x: inside, y: y - 16 * u[1], fill, "text-anchor": "middle", "dominant-baseline": "middle", "font-style": "italic", "font-size": 15 }, layer, text);
      },
      arrow(foot, v, color, label, side = 1) {
        const tip = px(add(foot, v)), start = px(foot), length = Math.hypot(tip[0] - start[0], tip[1] - start[1]);
        if (!(length > 0.5)) return;
        const u = [(tip[0] - start[0]) / length, (tip[1] - start[1]) / length], head = Math.min(11, length), off = 13 * side;
        const base = [tip[0] - head * u[0], tip[1] - head * u[1]], wing = [-u[1] * head * 0.42, u[0] * head * 0.42];
        make("line", { x1: start[0], y1: start[1], x2: base[0], y2: base[1], stroke: color, "stroke-width": 2.4 }, layer);
        make("polygon", { points: `${tip} ${base[0] + wing[0]},${base[1] + wing[1]} ${base[0] - wing[0]},${base[1] - wing[1]}`, fill: color }, layer);
        if (label) word([(start[0] + tip[0]) / 2 + off * u[1], (start[1] + tip[1]) / 2 - off * u[0]], label, color);
      },
      /* Beneath what has the same direction. */
      band(foot, v, color, label) {
        line(foot, add(foot, v), { stroke: color, "stroke-width": 9, opacity: 0.45 });
        const [x, y] = px(add(foot, v, 1.06));
        word([x, y - 6], label, color);
      },
      /* The angle between two directions, at the tip of one vector. */
      arc(at, u, v, color) {
        if (!(norm(u) > 0 && norm(v) > 1e-6)) return;
        const size = Math.min(0.32, 0.6 * norm(v)), from = Math.atan2(u[1], u[0]), by = turned(u, v);
        const sweep = ((by > 180 ? by - 360 : by) * Math.PI) / 180, steps = 24;
        const way = [...Array(steps + 1).keys()].map((k) => px(add(at, [Math.cos(from + (sweep * k) / steps), Math.sin(from + (sweep * k) / steps)], size)));
        line(at, add(at, unit(u), size * 1.4), { stroke: color, "stroke-width": 1, "stroke-dasharray": "3 3" });
        make("path", { d: "M" + way.join("L"), fill: "none", stroke: color, "stroke-width": 1.4 }, layer);
      },
      /* The turn from u to v, counterclockwise, round the origin. */
      turn(u, v, color, size) {
        const from = Math.atan2(u[1], u[0]), sweep = (turned(u, v) * Math.PI) / 180;
        const way = [...Array(49).keys()].map((k) => px(scale([Math.cos(from + (sweep * k) / 48), Math.sin(from + (sweep * k) / 48)], size)));
        make("path", { d: "M" + way.join("L"), fill: "none", stroke: color, "stroke-width": 1.6 }, layer);
      },
      mirror(normal) {
        const u = unit([-normal[1], normal[0]]);
        line(scale(u, -4), scale(u, 4), { stroke: "#666", "stroke-width": 1.2, "stroke-dasharray": "6 5" });
      },
      polygon(corners, fill) { make("polygon", { points: corners.map(px).join(" "), fill, stroke: "#bbb" }, layer); },
      dot(at, fill) { const [cx, cy] = px(at); make("circle", { cx, cy, r: 3.5, fill }, layer); },
      cross(at) {
        const [x, y] = px(at);
        make("path", { d: `M${x - 5},${y - 5}l10,10m0,-10l-10,10`, stroke: "#000", "stroke-width": 1.8 }, layer);
      },
    };
  }

  function mount(element) {
    const scene = scenes[element.dataset.scene];
    if (!scene || element.rotvq) return;
    const start = JSON.parse(element.dataset.start), state = {}, handles = {};
    for (const name in scene.points) state[name] = [start[name + "1"], start[name + "2"]];
    element.textContent = "";
    const low = scene.low ?? -LIMIT, height = (SIZE * (LIMIT - low)) / (2 * LIMIT);
    const bar = document.createElement("div"), again = document.createElement("button");
    bar.className = "rotvq-bar";
    bar.append("Drag the circles, or focus one and use the arrow keys.", again);
    again.type = "button";
    again.textContent = "Reset";
    element.appendChild(bar);
    const svg = make("svg", { viewBox: `0 0 ${SIZE} ${height}`, role: "group", "aria-label": "Figure with points to move: drag them, or focus one and use the arrow keys" }, element);
    make("rect", { width: SIZE, height, fill: "#fff" }, svg);
    make("path", { d: `M0,${SIZE / 2}H${SIZE}M${SIZE / 2},0V${height}`, stroke: "#eee" }, svg);
    const layer = make("g", {}, svg), paint = painter(layer);
    const says = document.createElement("div");
    says.className = "rotvq-says";
    says.setAttribute("role", "status");
    element.appendChild(says);

    const foot = (name) => (scene.points[name].on ? state[scene.points[name].on] : [0, 0]);
    const place = (name) => add(foot(name), state[name]);
    function update() {
      layer.textContent = "";
      const drawn = scene.draw(state, paint);
      says.textContent = "";
      drawn.lines.forEach((entry) => {
        const p = document.createElement("p"), [text, color] = Array.isArray(entry) ? entry : [entry];
        p.textContent = text;
        if (color) p.style.setProperty("--mark", color);
        says.appendChild(p);
      });
      for (const name in handles) {
        const [cx, cy] = px(place(name));
        handles[name].setAttribute("transform", `translate(${cx},${cy})`);
        handles[name].setAttribute("aria-valuetext", state[name].map((x) => x.toFixed(2)).join(", "));
      }
      element.rotvq = { state, drawn, move, update };
    }
    function move(name, to) {
      const hung = Object.keys(scene.points).filter((other) => scene.points[other].on === name);
      const bounded = to.map((x, i) => {
        const reach = [0, ...hung.map((other) => state[other][i])], edge = LIMIT - 0.1, least = (i ? low : -LIMIT) + 0.1;
        return Math.max(least - Math.min(...reach), Math.min(edge - Math.max(...reach), x));
      });
      state[name] = add(bounded, foot(name), -1);
      update();
    }
    again.addEventListener("click", () => {
      for (const name in scene.points) state[name] = [start[name + "1"], start[name + "2"]];
      update();
    });
    for (const name in scene.points) {
      const handle = make("g", { tabindex: 0, role: "slider", "aria-label": scene.points[name].label, class: "rotvq-handle" }, svg);
      make("circle", { r: 15, class: "rotvq-touch" }, handle);
      make("circle", { r: 6.5, class: "rotvq-dot" + (name === "o" ? " rotvq-origin" : "") }, handle);
      handle.addEventListener("pointerdown", (event) => {
        handle.setPointerCapture(event.pointerId);
        handle.focus();
        event.preventDefault();
      });
      handle.addEventListener("pointermove", (event) => {
        if (!handle.hasPointerCapture(event.pointerId)) return;
        const box = svg.getBoundingClientRect();
        move(name, [((event.clientX - box.left) / box.width) * 2 * LIMIT - LIMIT, LIMIT - ((event.clientY - box.top) / box.height) * (LIMIT - low)]);
      });
      handle.addEventListener("keydown", (event) => {
        const way = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, 1], ArrowDown: [0, -1] }[event.key];
        if (!way) return;
        move(name, add(place(name), way, event.shiftKey ? 0.25 : 0.05));
        event.preventDefault();
      });
      handles[name] = handle;
    }
    update();
  }

  /* A training to scrub through: panels of encoder outputs, codes in use and unused codes on one scale, a slider over its moments. */
  function mountFilm(element) {
    if (element.rotvqFilm) return;
    const { moments, limit, panels } = JSON.parse(element.querySelector("script").textContent);
    element.textContent = "";
    const unitOf = 110 / limit[0], height = 2 * limit[1] * unitOf;
    const at = ([x, y]) => [110 + x * unitOf, height / 2 - y * unitOf];
    const stage = document.createElement("div"), bar = document.createElement("div");
    stage.className = "rotvq-film-stage";
    bar.className = "rotvq-bar";
    element.append(bar, stage);
    const views = panels.map(({ title, color }) => {
      const box = document.createElement("div"), name = document.createElement("p");
      box.append(name);
      stage.append(box);
      return { name, svg: make("svg", { viewBox: `0 0 220 ${height}`, role: "img" }, box), title, color };
    });
    const play = document.createElement("button"), slider = document.createElement("input"), shown = document.createElement("output");
    play.type = "button";
    Object.assign(slider, { type: "range", min: 0, max: moments.length - 1, value: moments.length - 1 });
    slider.setAttribute("aria-label", "moment of the training");
    bar.append(play, slider, shown);
    function show(k) {
      slider.value = k;
      shown.textContent = moments[k];
      views.forEach(({ name, svg, title, color }, i) => {
        const { z, used, unused } = panels[i], spot = ([x, y], r, more) => make("circle", { cx: x, cy: y, r, ...more }, svg);
        svg.textContent = "";
        make("path", { d: `M0,${height / 2}H220M110,0V${height}`, class: "rotvq-axes" }, svg);
        z[k].map(at).forEach((v) => spot(v, 1.6, { fill: color }));
        used[k].map(at).forEach((v) => spot(v, 2.6, { class: "rotvq-used" }));
        unused[k].map(at).forEach(([x, y]) => make("path", { d: `M${x - 4},${y - 4}l8,8m0,-8l-8,8`, class: "rotvq-unused" }, svg));
        name.textContent = `${title}: ${panels[i].count[k]} codes in use, ${panels[i].notes[k]}`;
        svg.setAttribute("aria-label", `${name.textContent} at ${moments[k]}`);
      });
    }
    let timer = null;
    const rest = () => { clearInterval(timer); timer = null; play.textContent = "Play"; };
    const run = () => {
      if (Number(slider.value) === moments.length - 1) show(0);
      play.textContent = "Pause";
      timer = setInterval(() => (Number(slider.value) < moments.length - 1 ? show(Number(slider.value) + 1) : rest()), 450);
    };
    play.addEventListener("click", () => (timer ? rest() : run()));
    slider.addEventListener("input", () => { rest(); show(Number(slider.value)); });
    rest();
    show(moments.length - 1);
    element.rotvqFilm = { show, moments, panels };
    /* Once, when it is first seen; who wants less motion gets the last moment. */
    if (!window.matchMedia("(prefers-reduced-motion: reduce)").matches) {
      const seen = new IntersectionObserver((entries) => {
        if (entries[entries.length - 1].isIntersecting) { seen.disconnect(); run(); }
      }, { threshold: 0.5 });
      seen.observe(stage);
    }
  }

  /* What is near is drawn now, the rest when it comes near; until then the still picture stands there. */
  const draw = (element) => (element.classList.contains("rotvq-film") ? mountFilm : mount)(element);
  const waiting = new IntersectionObserver((entries) => entries.forEach(({ isIntersecting, target }) => {
    if (!isIntersecting) return;
    waiting.unobserve(target);
    draw(target);
  }), { rootMargin: "400px" });
  const mountAll = () => document.querySelectorAll(".rotvq-explorable, .rotvq-film").forEach((element) => waiting.observe(element));
  window.rotvq = { gradients, reflect, nearest, angle, cell, codes: CODES, points: POINTS, scenes, draw, mountAll,
    colors: COLORS, names: NAMES, ratio, degrees, vectors: { add, dot, norm, scale, unit } };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else mountAll();
})();
