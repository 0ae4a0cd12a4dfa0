// The dashboard: asks /v1/overview every two seconds. Texts of models and people become text nodes, never markup.
"use strict";
(() => {
  const PERIOD = 2000;
  const at = (id) => document.getElementById(id);
  const needsToken = document.body.dataset.needsToken === "yes";
  let token = needsToken ? sessionStorage.getItem("laif-token") || "" : "";
  let timer = 0;
  let failures = 0;

  function make(tag, options = {}, ...children) {
    const node = document.createElement(tag);
    if (options.class) node.className = options.class;
    if (options.title) node.title = options.title;
    for (const child of children) node.append(child); // strings become text nodes
    return node;
  }
  const count = (value) => Number(value).toLocaleString("en");
  const money = (value) => "$" + Number(value).toLocaleString("en", {
    minimumFractionDigits: 2, maximumFractionDigits: value !== 0 && value < 1 ? 6 : 2 });
  const rate = (value) => value >= 100 ? Math.round(value) : value.toFixed(value >= 10 ? 1 : 2);
  function span(seconds) {
    if (seconds === null || !isFinite(seconds)) return "–";
    const s = Math.ceil(seconds);
    if (s < 60) return s + " s";
    if (s < 3600) return Math.floor(s / 60) + " min " + String(s % 60).padStart(2, "0") + " s";
    if (s < 172800) return Math.floor(s / 3600) + " h " + String(Math.floor(s % 3600 / 60)).padStart(2, "0") + " min";
    return Math.round(s / 86400) + " days";
  }


  function table(node, rows) {
    if (!rows.length) return node.replaceChildren(make("p", { class: "none" }, "none"));
    const body = make("tbody", {}, ...rows.map((cells) => make("tr", {}, ...cells)));
    node.replaceChildren(make("table", {}, body));
  }
  const cell = (text, kind = "") => make("td", { class: kind }, text);
  const TONE = { ok: "good", done: "good", running: "good", tie: "", pending: "", in_flight: "", failed: "bad",
    out_of_budget: "bad", interrupted: "warm", refused: "warm", unparsable: "warm" };
  const counted = (counts) => Object.entries(counts).sort((a, b) => b[1] - a[1]);

  function bar(...shares) {
    const node = make("div", { class: "bar" });
    shares.forEach((share, i) => {
      const part = make(i ? "em" : "i");
      part.style.width = Math.max(0, Math.min(100, 100 * share)) + "%";
      node.append(part);
    });
    return node;
  }

  function spark(values) {
    const svg = at("spark");
    const most = Math.max(1, ...values);
    const x = (i) => (600 * i / Math.max(1, values.length - 1)).toFixed(1);
    const y = (v) => (84 - 78 * v / most).toFixed(1);
    const line = values.map((v, i) => (i ? "L" : "M") + x(i) + " " + y(v)).join("");
    const paths = values.length > 1 ? [["area", line + "L600 90L0 90Z"], ["line", line]] : [];
    svg.replaceChildren(...paths.map(([kind, d]) => {
      const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
      path.setAttribute("class", kind);
      path.setAttribute("d", d);
      return path;
    }));
    at("spark-text").textContent = values.length < 2 ? "measuring" :
      "the last " + span(values.length) + "; most in a second: " + count(Math.max(...values));
  }

  function jobCard(job) {
    const share = job.total ? job.done / job.total : 1;
    const head = make("h3", {}, make("span", { class: TONE[job.state] || "" }, job.state.replaceAll("_", " ")),
      " · " + job.kind + (job.critic ? " · " + job.critic : "") + " · " + job.endpoint);
    const facts = [count(job.done) + " of " + count(job.total)];
    for (const [state, n] of counted(job.counts)) facts.push(count(n) + " " + state);
    const cost = job.cost || job.budget !== null ? money(job.cost) + (job.budget !== null ? " of " + money(job.budget) : "") : "";
    const pace = job.state === "running" && job.rate !== null ?
      rate(job.rate) + "/s" + (job.eta !== null ? " · " + span(job.eta) + " left" : "") : "";
    const card = make("div", { class: "card job" }, head, bar(share),
      make("div", { class: "line" }, make("span", {}, facts.join(" · ")),
        make("span", { class: "meta" }, [pace, cost, job.id].filter(Boolean).join(" · "))));
    if (job.reason) card.append(make("p", { class: "meta" }, job.reason));
    return card;
  }

  function side(name, text, better) {
    return make("div", { class: better ? "side better" : "side" }, make("h4", {}, name), make("p", { class: "body" }, text));
  }
  function judgement(item) {
    let verdict = item.status;
    if (item.p_b !== null) verdict = item.p_b === 0.5 ? "tie" : (item.p_b > 0.5 ? "b" : "a") + " is better, with probability " +
      Math.max(item.p_b, 1 - item.p_b).toFixed(3);
    const card = make("div", { class: "card" }, make("h3", { class: item.p_b === null ? "bad" : "" }, verdict),
      make("p", { class: "meta" }, item.critic + " · " + item.order + " · " + item.date.replace("T", " ").slice(0, 19)));
    if (item.reason) card.append(make("p", { class: "bad" }, item.reason));
    if (item.a !== null) {
      card.append(make("p", { class: "body" }, item.question), make("div", { class: "pair" },
        side("a", item.a, item.p_b > 0.5 ? false : item.p_b !== null && item.p_b < 0.5), side("b", item.b, item.p_b > 0.5)));
    } else {
      card.append(make("div", { class: "pair" }, side("what the critic was shown", item.question, false),
        side("what it answered", item.answer, false)));
    }
    return card;
  }

  function show(data) {
    at("place").textContent = data.store + ", up for " + span(data.uptime);
    at("stalled").hidden = !data.stalled;
    at("stalled").textContent = data.stalled;
    at("tile-rate").textContent = rate(data.per_second);
    at("tile-flight").textContent = count(data.endpoints.reduce((n, e) => n + e.in_flight, 0));
    const waiting = data.endpoints.reduce((n, e) => n + e.waiting, 0);
    at("tile-waiting").textContent = waiting ? ", " + count(waiting) + " waiting" : "";
    at("tile-results").textContent = count(data.requests.ok || 0);
    const m = data.money;
    at("tile-money").textContent = money(m.spent + m.presumed);
    at("tile-cap").textContent = (m.cap === null ? "spent, no budget set" : "spent of " + money(m.cap)) +
      (m.reserved ? ", " + money(m.reserved) + " reserved" : "") + (m.presumed ? ", " + money(m.presumed) + " presumed" : "");
    const track = at("money-bar");
    track.hidden = !m.cap;
    if (m.cap) track.replaceChildren(...bar((m.spent + m.presumed) / m.cap, m.reserved / m.cap).childNodes);
    const open = data.jobs.filter((job) => job.state === "running");
    const known = open.filter((job) => job.eta !== null);
    const broke = data.jobs.some((job) => job.state === "out_of_budget");
    at("tile-eta").textContent = open.length ? span(known.length ? Math.max(...known.map((job) => job.eta)) : null) :
      broke ? "out of budget" : "idle";
    at("tile-eta-text").textContent = open.length || !broke ? "until all jobs are done" : "raise it: laif label budget AMOUNT";
    spark(data.throughput);
    at("jobs").replaceChildren(...(data.jobs.length ? data.jobs.map(jobCard) : [make("p", { class: "none" }, "no job yet")]));
    const states = (name, counts) => counted(counts).map(([state, n]) =>
      [cell(name), cell(state, TONE[state] || ""), cell(count(n), "number")]);
    table(at("states"), [...states("requests", data.requests), ...states("results", data.results)]);
    table(at("errors"), counted(data.errors).map(([kind, n]) => [cell(kind), cell(count(n), "number")]));
    at("latest-errors").replaceChildren(...data.latest_errors.slice(0, 5).map((e) =>
      make("li", {}, e.date.slice(11, 19) + " " + e.kind + ": " + e.reason)));
    table(at("endpoints"), data.endpoints.map((e) => [make("td", {}, e.name, ...(e.stopped ? [make("div", { class: "bad" }, e.stopped)] : [])),
      cell(count(e.in_flight) + " of " + count(e.limit), "number")]));
    if (!window.getSelection().toString()) { // do not take away what is being copied
      at("judgements").replaceChildren(...(data.judgements.length ? data.judgements.map(judgement) :
        [make("p", { class: "none" }, "no judgement yet")]));
    }
  }

  function connection(kind, text) {
    at("state").className = "dot " + kind;
    at("connection").textContent = text;
  }
  function askForToken(problem) {
    at("main").hidden = true;
    at("login").hidden = false;
    at("token-problem").textContent = problem;
    connection("wait", "token needed");
    at("token").focus();
  }

  async function look() {
    clearTimeout(timer);
    if (needsToken && !token) return askForToken("");
    let next = PERIOD;
    try {
      const headers = token ? { Authorization: "Bearer " + token } : {};
      const response = await fetch("v1/overview", { headers, cache: "no-store" });
      if (response.status === 401) {
        token = "";
        sessionStorage.removeItem("laif-token");
        return askForToken("The service does not accept this token.");
      }
      if (response.status === 429) next = 1000 * Number(response.headers.get("Retry-After") || 5);
      if (!response.ok) throw new Error((await response.json()).detail);
      show(await response.json());
      at("login").hidden = true;
      at("main").hidden = false;
      failures = 0;
      connection("live", "live");
    } catch (error) {
      failures += 1;
      next = Math.max(next, Math.min(30000, PERIOD * failures));
      connection("lost", "no connection: " + error.message);
    }
    if (!document.hidden) timer = setTimeout(look, next);
  }

  at("token-form").addEventListener("submit", (event) => {
    event.preventDefault();
    token = at("token").value.trim();
    at("token").value = "";
    sessionStorage.setItem("laif-token", token);
    look();
  });
  document.addEventListener("visibilitychange", () => { if (!document.hidden) look(); });
  look();
})();
