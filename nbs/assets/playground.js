/* The playground: what one step does to a cell of points, and two tiny VQ-VAEs that train side by side.
   Needs rotvq.js and nothing else. The same seed gives the same run; its steps are checked against the Python package. */
(function () {
  "use strict";
  const { gradients, nearest, angle, ratio, degrees, colors, names, vectors, scenes } = window.rotvq;
  const { add, dot, norm, scale, unit } = vectors;

  /* Uniform numbers in [0, 1) from a seed (mulberry32). */
  function generator(seed) {
    let state = seed >>> 0;
    return () => {
      state = (state + 0x6d2b79f5) | 0;
      let t = Math.imul(state ^ (state >>> 15), 1 | state);
      t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
      return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
    };
  }
  const gauss = (rand) => Math.sqrt(-2 * Math.log(1 - rand())) * Math.cos(2 * Math.PI * rand());

  const TURN = 4.4 * Math.PI;
  const DENSITIES = {
    spiral(rand) {
      const t = TURN * Math.sqrt(rand()), r = (1.5 * t) / TURN;
      return [r * Math.cos(t) + 0.05 * gauss(rand), r * Math.sin(t) + 0.05 * gauss(rand)];
    },
    ring(rand) {
      const t = (Math.floor(8 * rand()) * Math.PI) / 4;
      return [1.3 * Math.cos(t) + 0.15 * gauss(rand), 1.3 * Math.sin(t) + 0.15 * gauss(rand)];
    },
    square: (rand) => [2.6 * rand() - 1.3, 2.6 * rand() - 1.3],
  };

  /* A linear layer, with what Adam remembers. */
  class Linear {
    constructor(inputs, outputs, rand) {
      const bound = 1 / Math.sqrt(inputs), draw = () => bound * (2 * rand() - 1);
      this.weight = Array.from({ length: outputs }, () => Array.from({ length: inputs }, draw));
      this.bias = Array.from({ length: outputs }, draw);
      const zeros = () => [...this.weight.map((row) => row.map(() => 0)), this.bias.map(() => 0)];
      [this.mean, this.square, this.grad] = [zeros(), zeros(), zeros()];
    }
    forward(rows) {
      this.rows = rows;
      const { weight, bias } = this, inputs = weight[0].length;
      return rows.map((x) => {
        const out = [...bias];
        for (let i = 0; i < out.length; i++) {
          const w = weight[i];
          for (let j = 0; j < inputs; j++) out[i] += w[j] * x[j];
        }
        return out;
      });
    }
    backward(grads) {
      const outputs = this.bias.length, inputs = this.weight[0].length;
      for (const row of this.grad) row.fill(0);
      return grads.map((g, n) => {
        const back = new Array(inputs).fill(0), x = this.rows[n];
        for (let i = 0; i < outputs; i++) {
          const gi = g[i], w = this.weight[i], grad = this.grad[i];
          this.grad[outputs][i] += gi;
          for (let j = 0; j < inputs; j++) {
            grad[j] += gi * x[j];
            back[j] += gi * w[j];
          }
        }
        return back;
      });
    }
    adam(lr, step) {
      const c1 = 1 - 0.9 ** step, c2 = 1 - 0.999 ** step;
      [...this.weight, this.bias].forEach((row, i) => row.forEach((_, j) => {
        const g = this.grad[i][j], m = (this.mean[i][j] += 0.1 * (g - this.mean[i][j]));
        const v = (this.square[i][j] += 0.001 * (g * g - this.square[i][j]));
        row[j] -= (lr * (m / c1)) / (Math.sqrt(v / c2) + 1e-8);
      }));
    }
  }

  const tanh = (rows) => rows.map((row) => row.map(Math.tanh));
  const through = (grads, values) => grads.map((g, n) => g.map((gi, i) => gi * (1 - values[n][i] ** 2)));

  const DEFAULTS = { estimator: "rotation", density: "spiral", start: "short", lookup: "euclidean", decay: 0.8,
    commitment: 1, lr: 0.01, revive: 0, shift: 0, seed: 1, codes: 64, hidden: 16, batch: 128 };
  const STARTS = {
    uniform: (rand, o) => Math.sqrt(6 / (o.codes * 2)) * (2 * rand() - 1),
    short: (rand, o) => (2 * rand() - 1) / o.codes,
    normal: (rand) => gauss(rand),
  };

  /* A VQ-VAE from the plane to the plane: encoder and decoder of one hidden layer, running averages, Adam. */
  class Toy {
    constructor(options) {
      const o = (this.options = { ...DEFAULTS, ...options }), rand = (this.rand = generator(o.seed));
      this.layers = [[2, o.hidden], [o.hidden, 2], [2, o.hidden], [o.hidden, 2]].map(([a, b]) => new Linear(a, b, rand));
      this.places = generator(o.seed + 1000);                                 // of its own, so that revival leaves the data alone
      const held = generator(12345);
      this.held = Array.from({ length: 512 }, () => DENSITIES[o.density](held));
      this.codebook = this.startCodes();
      if (o.lookup === "cosine") this.codebook = this.codebook.map(unit);
      this.sums = this.codebook.map((c) => [...c]);
      this.counts = this.codebook.map(() => 1);
      this.waited = this.codebook.map(() => 0);
      this.idle = this.codebook.map(() => Infinity);
      this.steps = 0;
      this.history = [];
      this.measure();
    }
    startCodes() {
      const { codes, start, lookup } = this.options, draw = STARTS[start];
      if (draw) return Array.from({ length: codes }, () => [draw(this.rand, this.options), draw(this.rand, this.options)]);
      const z = this.encode(this.draw(1024));                                  // k-means: ten of Lloyd's steps
      let means = Array.from({ length: codes }, () => z[Math.floor(this.rand() * z.length)]);
      for (let round = 0; round < 10; round++) {
        const of = z.map((v) => nearest(v, means)), now = means;
        means = now.map((c, k) => {
          const mine = z.filter((_, n) => of[n] === k);
          const mean = mine.length ? scale(mine.reduce((sum, v) => add(sum, v)), 1 / mine.length) : c;
          return lookup === "cosine" ? unit(mean) : mean;
        });
      }
      return means;
    }
    draw(n) { return Array.from({ length: n }, () => DENSITIES[this.options.density](this.rand)); }
    encode(x) {
      let z = this.layers[1].forward((this.inner = tanh(this.layers[0].forward(x))));
      if (this.options.shift) z = z.map((v) => add(v, [this.options.shift, this.options.shift]));
      this.before = z;
      return this.options.lookup === "cosine" ? z.map(unit) : z;
    }
    decode(q) {
      const back = -this.options.shift, from = back ? q.map((v) => add(v, [back, back])) : q;   // the decoder knows of no shift
      return this.layers[3].forward((this.outer = tanh(this.layers[2].forward(from))));
    }

    step(x = this.draw(this.options.batch)) {
      const { options: o, layers, codebook } = this, n = x.length * 2;
      const z = this.encode(x);
      if (o.revive) this.reviveOn(z);
      const of = z.map((v) => nearest(v, codebook)), q = of.map((k) => [...codebook[k]]);
      const y = this.decode(q);
      const gy = y.map((row, i) => row.map((v, j) => (2 * (v - x[i][j])) / n));
      const g = layers[2].backward(through(layers[3].backward(gy), this.outer));
      const w = this.weight();
      const gz = z.map((v, i) => {
        const back = add(gradients[o.estimator](v, q[i], g[i], undefined, w), add(v, q[i], -1), (2 * o.commitment) / n);
        return o.lookup === "cosine" ? scale(add(back, v, -dot(v, back)), 1 / norm(this.before[i])) : back;
      });
      layers[0].backward(through(layers[1].backward(gz), this.inner));
      this.steps += 1;
      layers.forEach((layer) => layer.adam(o.lr, this.steps));
      this.learn(z, of);
    }
    /* The rule's: share of codes that none of the last 160 K vectors chose, and less than a quarter as long as the others. */
    weight() {
      const total = Math.max(1, this.counts.reduce((a, b) => a + b)), K = this.codebook.length;
      const after = Math.max(1, (160 * K) / total - 0.5), used = this.codebook.filter((_, k) => this.idle[k] < after);
      const long = used.reduce((sum, c) => sum + norm(c), 0) / used.length;
      return this.codebook.filter((c, k) => this.idle[k] >= after && !(norm(c) >= long / 4)).length / K;
    }
    /* Running averages with smoothed counts, as in the chapter on VQ-VAE. */
    learn(z, of) {
      const { decay, lookup } = this.options, eps = 1e-5, K = this.codebook.length;
      const sums = this.codebook.map(() => [0, 0]), counts = new Array(K).fill(0);
      of.forEach((k, i) => { sums[k] = add(sums[k], z[i]); counts[k] += 1; });
      for (let k = 0; k < K; k++) {
        this.counts[k] += (1 - decay) * (counts[k] - this.counts[k]);
        this.sums[k] = add(scale(this.sums[k], decay), sums[k], 1 - decay);
        this.waited[k] = counts[k] ? 0 : this.waited[k] + 1;
        this.idle[k] = counts[k] ? 0 : this.idle[k] + 1;
      }
      const total = this.counts.reduce((a, b) => a + b);
      for (let k = 0; k < K; k++) {
        const code = scale(this.sums[k], (total + K * eps) / ((this.counts[k] + eps) * total));
        this.codebook[k] = lookup === "cosine" ? unit(code) : code;
      }
    }
    reviveOn(z) {
      this.waited.forEach((waited, k) => {
        if (waited < this.options.revive) return;
        const v = z[Math.floor(this.places() * z.length)];
        [this.codebook[k], this.sums[k], this.counts[k], this.waited[k]] = [[...v], [...v], 1, 0];
      });
    }
    /* On 512 points that are never trained on: codes used, mean squared error. */
    measure() {
      const z = this.encode(this.held), of = z.map((v) => nearest(v, this.codebook)), used = new Set(of);
      const y = this.decode(of.map((k) => this.codebook[k]));
      const mse = y.reduce((sum, row, i) => sum + row.reduce((s, v, j) => s + (v - this.held[i][j]) ** 2, 0), 0) / (2 * y.length);
      const size = Math.sqrt(z.reduce((sum, v) => sum + dot(v, v), 0) / z.length);
      this.seen = { step: this.steps, used: used.size, mse, size, z, y, alive: used };
      this.history.push({ step: this.steps, used: used.size, mse, estimator: this.options.estimator });
      if (this.history.length > 400) this.history = this.history.filter((_, i) => i % 2 === 0);
      return this.seen;
    }
  }

  /* First panel: a scene for rotvq.js. Its options are set by the controls. */
  const RINGS = [[0, 0], ...[0.16, 0.32].flatMap((r, ring) => Array.from({ length: 8 }, (_, k) => {
    const t = ((k + ring / 2) * Math.PI) / 4;
    return [r * Math.cos(t), r * Math.sin(t)];
  }))];
  const chosen = { estimator: "rotation", gamma: null, weight: 0.5, rate: 0.4 };
  const spread = (points) => {
    const mean = scale(points.reduce((sum, v) => add(sum, v)), 1 / points.length);
    return Math.sqrt(points.reduce((sum, v) => sum + norm(add(v, mean, -1)) ** 2, 0) / points.length);
  };
  scenes.cell = {
    points: { z: { label: "z, with the points of its cell around it" }, q: { label: "q, the code" }, g: { label: "g, the gradient at q", on: "q" } },
    draw(p, paint) {
      const { estimator, gamma, weight, rate } = chosen, color = colors[estimator];
      const push = (v) => gradients[estimator](v, p.q, p.g, gamma === null ? undefined : gamma, weight);
      const cell = RINGS.map((offset) => add(p.z, offset)), after = cell.map((v) => add(v, push(v), -rate)), v = push(p.z);
      paint.arrow([0, 0], p.z, "#7f7f7f", "z");
      paint.arrow([0, 0], p.q, "#7f7f7f", "q");
      paint.arrow(p.q, p.g, "#000", "g");
      paint.arrow(p.z, v, color, "v");
      cell.forEach((point) => paint.dot(point, "#bbb"));
      after.forEach((point) => paint.dot(point, color));
      return { cell, after, gradient: v, lines: [`from z to q: θ = ${degrees(angle(p.z, p.q))}, λ = ‖q‖/‖z‖ = ${ratio(p.q, p.z).toFixed(2)}`,
        [`v, the gradient at z: turned by ${degrees(angle(p.g, v))}, ${(norm(v) / norm(p.g)).toFixed(2)} times as long as g`, color],
        `angle of q and g: ${degrees(angle(p.q, p.g))}; of z and v: ${degrees(angle(p.z, v))}`,
        `a step of −${rate} v: spread of the cell × ${(spread(after) / spread(cell)).toFixed(2)}, ‖z‖ × ${(norm(after[0]) / norm(p.z)).toFixed(2)}`] };
    },
  };

  function element(kind, parent, attributes = {}, text) {
    const made = document.createElement(kind);
    for (const key in attributes) made.setAttribute(key, attributes[key]);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }
  function choice(parent, label, options, value, act) {
    const select = element("select", element("label", parent, {}, `${label} `));
    for (const [key, text] of Object.entries(options)) element("option", select, { value: key }, text);
    select.value = value;
    select.addEventListener("change", () => act(select.value));
    return select;
  }

  function mountStep(root) {
    const controls = element("div", root, { class: "playground-controls" });
    const figure = element("div", root, { class: "rotvq-explorable", "data-scene": "cell", "data-start": root.dataset.start });
    const draw = () => figure.rotvq && figure.rotvq.update();
    choice(controls, "estimator", names, chosen.estimator, (value) => { chosen.estimator = value; unused.disabled = value !== "rotation-until-used"; draw(); });
    const label = element("label", controls, {}, "length ");
    const own = element("select", label, { "aria-label": "length of the gradient" });
    for (const [key, text] of [["lambda", "λ, as published"], ["own", "γ, chosen"]]) element("option", own, { value: key }, text);
    const gamma = element("input", element("label", controls, {}, "γ "), { type: "range", min: 0.1, max: 2, step: 0.05, value: 1 });
    const shown = element("output", controls);
    const unused = element("input", element("label", controls, {}, "w, the share of codes unused "), { type: "range", min: 0, max: 1, step: 0.05, value: chosen.weight });
    unused.disabled = true;
    unused.addEventListener("input", () => { chosen.weight = Number(unused.value); draw(); });
    const set = () => {
      gamma.disabled = own.value === "lambda";
      chosen.gamma = gamma.disabled ? null : Number(gamma.value);
      shown.textContent = gamma.disabled ? "" : chosen.gamma.toFixed(2);
      draw();
    };
    own.addEventListener("change", set);
    gamma.addEventListener("input", set);
    set();
  }

  const FAINT = "#8a93a0", UNUSED = "#d0453b";
  /* `width` by `height` units, at the resolution of the screen; the ink is that of the theme (whose sheet may load after its class). */
  function surface(canvas, width, height) {
    const dots = window.devicePixelRatio || 1;
    if (canvas.width !== Math.round(width * dots)) { canvas.width = Math.round(width * dots); canvas.height = Math.round(height * dots); }
    const pen = canvas.getContext("2d");
    pen.setTransform(dots, 0, 0, dots, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "13px system-ui, sans-serif";
    pen.ink = document.body.classList.contains("quarto-dark") ? "#e6e9ee" : "#1d2430";
    return pen;
  }
  const PANEL = 360, SMALL = 200, CHART = 150;

  /* Where marks are drawn: those that lie on one another are laid out round their place, so that a heap looks like one. */
  function laidOut(places) {
    const heaps = [];
    return places.map((at) => {
      let heap = heaps.find(({ centre }) => norm(add(at, centre, -1)) < 5);
      if (!heap) heaps.push((heap = { centre: at, count: 0 }));
      const k = heap.count++, r = 5 * Math.sqrt(k), t = 2.4 * k;
      return k ? add(heap.centre, [r * Math.cos(t), r * Math.sin(t)]) : at;
    });
  }
  function drawPlane(canvas, side, points, limit, color, alive, unused) {
    const pen = surface(canvas, side, side), at = ([x, y]) => [side / 2 + (x / limit) * (side / 2), side / 2 - (y / limit) * (side / 2)];
    pen.strokeStyle = "rgba(128, 128, 128, .35)";
    pen.beginPath();
    pen.moveTo(0, side / 2); pen.lineTo(side, side / 2); pen.moveTo(side / 2, 0); pen.lineTo(side / 2, side);
    pen.stroke();
    const spot = ([x, y], radius, fill) => { pen.fillStyle = fill; pen.beginPath(); pen.arc(x, y, radius, 0, 7); pen.fill(); };
    points.forEach((v) => spot(at(v), 1.8, color));
    pen.strokeStyle = UNUSED;
    pen.lineWidth = 1.5;
    laidOut(unused.map(at)).forEach(([x, y]) => {
      pen.beginPath();
      pen.moveTo(x - 3, y - 3); pen.lineTo(x + 3, y + 3); pen.moveTo(x - 3, y + 3); pen.lineTo(x + 3, y - 3);
      pen.stroke();
    });
    alive.forEach((v) => spot(at(v), side === PANEL ? 4.5 : 2, pen.ink));
    pen.lineWidth = 1;
  }
  function drawChart(canvas, toys, key, title, log) {
    const width = 460, pen = surface(canvas, width, CHART), left = 54, bottom = CHART - 22;
    const all = toys.flatMap((toy) => toy.history), last = Math.max(100, ...all.map((row) => row.step));
    const value = (row) => (log ? Math.log10(row[key]) : row[key]);
    const low = log ? Math.min(...all.map(value)) : 0, high = log ? Math.max(...all.map(value)) : toys[0].options.codes;
    const x = (step) => left + (step / last) * (width - left - 8), y = (v) => bottom - ((v - low) / (high - low || 1)) * (bottom - 24);
    pen.strokeStyle = FAINT;
    pen.strokeRect(left, 24, width - left - 8, bottom - 24);
    pen.fillStyle = pen.ink;
    pen.fillText(title, left, 16);
    pen.textAlign = "right";
    [low, high].forEach((v) => pen.fillText(log ? (10 ** v).toPrecision(2) : v, left - 6, y(v) + 4));
    pen.fillText(`step ${last}`, width - 8, CHART - 6);
    pen.textAlign = "left";
    pen.lineWidth = 2;
    toys.forEach((toy, side) => toy.history.slice(1).forEach((row, i) => {
      const before = toy.history[i];
      pen.strokeStyle = colors[row.estimator];
      const other = side ? toys[0].history[i + 1] : null;
      pen.setLineDash(other && other.estimator === row.estimator ? [3, 3] : []);
      pen.beginPath();
      pen.moveTo(x(before.step), y(value(before)));
      pen.lineTo(x(row.step), y(value(row)));
      pen.stroke();
    }));
    pen.setLineDash([]);
    pen.lineWidth = 1;
  }

  const PLAIN = { density: "spiral", start: "short", lookup: "euclidean", decay: "0.8", commitment: "1", lr: "0.01", revive: "0", shift: "0", seed: "1" };
  /* What the buttons set: what differs from PLAIN, the two estimators, where to stop, and what is to be seen. */
  const PRESETS = {
    collapse: { title: "Collapse", set: { density: "ring", decay: "0.99" }, sides: ["ste", "rotation"], until: 600, speed: 2,
      says: "Eight heaps of data want eight codes at least, and each model has 64. At step 600 straight-through uses fewer than eight of them, the rotation 14: codebook collapse, and what the trick does about it. (Chosen to show this.)" },
    rule: { title: "The rule", set: {}, sides: ["ste", "rotation-until-used"], until: 3000, speed: 8,
      says: "Rotate only while codes lie unused: the codebook fills, then the gradient goes straight." },
    revive: { title: "Revive", set: { revive: "50" }, sides: ["ste", "rotation"], until: 600, speed: 2,
      says: "A code that nobody chose in 50 batches is put where a vector is. Both codebooks fill, under either gradient." },
    far: { title: "Far from the origin", set: { shift: "3" }, sides: ["ste", "rotation"], until: 600, speed: 2,
      says: "All encoder outputs are moved away from the origin. Seen from there, angles are small, and the rotation is hardly more than straight-through: both use one code." },
    ahead: { title: "Straight-through ahead", set: { start: "normal" }, sides: ["ste", "rotation"], until: 1000, speed: 4,
      says: "Codes start at N(0, 1), all around. Both codebooks fill by themselves, and straight-through has the lower error." },
  };

  /* With `data-hero` only the preset of that name is shown: two panels, their counters and a button. */
  function mountTraining(root) {
    const hero = root.dataset.hero in PRESETS ? root.dataset.hero : null;
    root.textContent = "";
    const calm = window.matchMedia("(prefers-reduced-motion: reduce)").matches;
    let toys, playing = false, away = false, touched = false, waiting = false, speed, until, preset, limits, frame = 0, share = 0.25;
    const settings = { ...PLAIN }, sides = [];
    const presets = element("div", root, { class: "playground-controls", role: "group", "aria-label": "What to show" });
    const buttons = Object.fromEntries(Object.entries(PRESETS).map(([key, { title }]) => {
      const button = element("button", presets, { type: "button" }, title);
      button.addEventListener("click", () => { touched = true; load(key); begin(); });
      return [key, button];
    }));
    const about = element("p", root, { class: "playground-about" });
    const stage = element("div", root, { class: "playground-stage" });
    const views = [0, 1].map((side) => {
      const box = element("div", stage, { class: "playground-model" });
      const select = hero ? element("output", box, { class: "playground-name" })
        : choice(box, "estimator", names, "ste", (value) => {
          touched = true;
          sides[side] = toys[side].options.estimator = value;
          name(null);
          draw();
        });
      if (!hero) select.setAttribute("aria-label", `estimator of the ${side ? "second" : "first"} model`);
      const count = element("p", box, { class: "playground-count" }), latent = element("canvas", box, { role: "img" });
      return { select, count, latent };
    });
    const controls = element("div", root, { class: "playground-controls" });
    const play = element("button", controls, { type: "button", class: "playground-play" }, "Play");
    const one = element("button", controls, { type: "button" }, "One step");
    const again = element("button", controls, { type: "button" }, "Start again");
    const used = element("canvas", root, { role: "img", "aria-label": "Codes used, by step, a line for each model", class: "playground-chart" });
    const error = element("canvas", root, { role: "img", "aria-label": "Mean squared error, by step, a line for each model", class: "playground-chart" });
    const says = element("div", root, { class: "rotvq-says playground-says", role: "status" });
    const details = element("details", root, { class: "playground-more" });
    element("summary", details, {}, "More");
    const more = element("div", details, { class: "playground-controls" }), selects = {};
    const set = (key) => (value) => { touched = true; settings[key] = value; name(null); reset(); };
    const select = (key, label, options) => { selects[key] = choice(more, label, options, settings[key], set(key)); };
    const pace = choice(more, "steps a frame", { 1: "1", 2: "2", 4: "4", 8: "8", 32: "32" }, "2", (value) => { speed = Number(value); });
    select("density", "data", { spiral: "spiral", ring: "eight heaps", square: "square" });
    select("start", "codes start", { uniform: "uniform", short: "U(±1/K)", normal: "N(0, 1)", kmeans: "by k-means" });
    select("lookup", "lookup", { euclidean: "Euclidean", cosine: "cosine" });
    select("decay", "decay", { 0.8: "0.8", 0.99: "0.99" });
    select("commitment", "β", { 0.25: "1/4", 1: "1", 4: "4" });
    select("lr", "rate", { 0.003: "0.003", 0.01: "0.01", 0.03: "0.03" });
    select("revive", "revival", { 0: "off", 50: "after 50 batches" });
    select("shift", "z moved by", { 0: "nothing", 1: "(1, 1)", 3: "(3, 3)" });
    select("seed", "seed", { 1: "1", 2: "2", 3: "3", 4: "4", 5: "5" });
    element("p", details, {}, "Data (grey) and what each model reconstructs of it:");
    const pairs = element("div", details, { class: "playground-data" });
    views.forEach((view) => { view.data = element("canvas", pairs, { role: "img" }); });
    details.addEventListener("toggle", () => draw());

    /* A button that is pressed, and what it shows; none once a setting is changed. */
    function name(key) {
      preset = key;
      for (const k in buttons) buttons[k].setAttribute("aria-pressed", k === key);
      about.textContent = key ? PRESETS[key].says : "A setting of your own.";
      until = key ? PRESETS[key].until : Infinity;
    }
    function load(key) {
      Object.assign(settings, PLAIN, PRESETS[key].set);
      for (const k in selects) selects[k].value = settings[k];
      PRESETS[key].sides.forEach((estimator, side) => {
        sides[side] = estimator;
        views[side].select.value = hero ? names[estimator] : estimator;
      });
      speed = PRESETS[key].speed;
      pace.value = speed;
      name(key);
      reset();
    }
    function reset() {
      const numbers = Object.fromEntries(Object.entries(settings).map(([key, value]) => [key, Number.isNaN(Number(value)) ? value : Number(value)]));
      toys = sides.map((estimator) => new Toy({ ...numbers, estimator }));
      limits = [0, 0];
      frame = 0;
      if (preset) until = PRESETS[preset].until;
      draw();
    }
    function advance(count) {
      for (let k = 0; k < count; k++) toys.forEach((toy) => toy.step());
      toys.forEach((toy) => toy.measure());
    }
    function draw() {
      toys.forEach((toy, side) => {
        const { z, y, alive, used: count, size } = toy.seen, view = views[side], color = colors[toy.options.estimator];
        const reach = 1.15 * Math.max(...z.map(norm), 1e-3), unused = toy.codebook.length - count;
        limits[side] = limits[side] ? limits[side] + 0.1 * (reach - limits[side]) : reach;
        const [seen, rest] = [true, false].map((wanted) => toy.codebook.filter((_, k) => alive.has(k) === wanted));
        drawPlane(view.latent, PANEL, z, limits[side], color, seen, rest);
        if (details.open) drawPlane(view.data, SMALL, toy.held, 1.9, "rgba(128, 128, 128, .5)", y, []);
        view.count.textContent = "";
        element("b", view.count, {}, String(count));
        view.count.append(` of ${toy.codebook.length} codes in use` + (hero ? "" : `; error ${toy.seen.mse.toFixed(3)}`));
        if (playing) return;                                                   // said when it rests
        const title = names[toy.options.estimator];
        view.latent.setAttribute("aria-label", `${title}: encoder outputs of root mean square length ${size.toFixed(2)}, ${count} codes in use, ${unused} not`);
        view.data.setAttribute("aria-label", `${title}: points of the data and their reconstructions`);
      });
      drawChart(used, toys, "used", "codes used");
      drawChart(error, toys, "mse", "mean squared error (log)", true);
      if (frame % 60 === 0 || !playing) tell();
    }
    function tell() {
      says.textContent = "";
      element("p", says, {}, `step ${toys[0].steps}, ${toys[0].options.codes} codes`);
      toys.forEach((toy) => {
        const line = element("p", says, {}, `${names[toy.options.estimator]}: ${toy.seen.used} codes used, mean squared error ${toy.seen.mse.toFixed(4)}`);
        line.style.setProperty("--mark", colors[toy.options.estimator]);
      });
    }
    function later() {
      if (!waiting) requestAnimationFrame(run);
      waiting = true;
    }
    function run() {
      waiting = false;
      if (!playing || away) return;
      frame += 1;
      const begun = performance.now();
      advance(Math.max(1, Math.min(Math.round(speed * share), until - toys[0].steps)));
      const took = performance.now() - begun;                                  // a slow device keeps its frames short
      share = took > 12 ? Math.max(0.25, share / 2) : took < 5 ? Math.min(1, 2 * share) : share;
      if (toys[0].steps >= until) { until = Infinity; return toggle(false); }   // press Play to go on from here
      draw();
      later();
    }
    function toggle(on) {
      playing = on;
      play.textContent = on ? "Pause" : "Play";
      says.setAttribute("aria-live", on ? "off" : "polite");
      if (toys[0].steps >= until) until = Infinity;
      if (on) later(); else draw();
    }
    /* Who wants less motion gets the end, a part of it at a time so that the page stays awake. */
    function begin() {
      if (!calm) return toggle(true);
      toggle(false);
      const mine = toys, part = () => {
        if (toys !== mine || playing) return;
        for (let k = 0; k < 5 && toys[0].steps < until; k++) advance(Math.min(10, until - toys[0].steps));
        if (toys[0].steps < until) return void setTimeout(part);
        [until, limits] = [Infinity, [0, 0]];                                   // the frame of the last clouds
        draw();
      };
      if (until < Infinity) part();
    }
    play.addEventListener("click", () => { touched = true; toggle(!playing); });
    one.addEventListener("click", () => { touched = true; toggle(false); advance(1); draw(); });
    again.addEventListener("click", () => { touched = true; reset(); });
    if (hero) [presets, about, one, used, error, says, details].forEach((part) => { part.hidden = true; });
    load(hero || "collapse");
    root.playground = { toys: () => toys, playing: () => playing };

    /* It starts by itself when it is seen, and rests while it is not. */
    new IntersectionObserver((entries) => {
      away = !entries[entries.length - 1].isIntersecting;
      if (away) return;
      if (playing) return later();
      if (touched) return;
      touched = true;
      begin();
    }, { threshold: 0.25 }).observe(stage);
    new MutationObserver(draw).observe(document.body, { attributes: true, attributeFilter: ["class"] });   // the theme
  }

  window.rotvq.presets = PRESETS;
  window.rotvq.Toy = Toy;
  window.rotvq.densities = DENSITIES;
  const mountAll = () => {
    document.querySelectorAll(".playground-step").forEach((root) => { if (!root.firstChild) mountStep(root); });
    document.querySelectorAll(".playground-training").forEach((root) => { if (!root.playground) mountTraining(root); });
    window.rotvq.mountAll();
  };
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", mountAll);
  else mountAll();
})();
