"use strict";
// What a served page asks its server: the newest question of a kind counts, answers are kept.
const fetched = (report) => {
  const KEPT = 300, TRIES = 7;
  const kept = new Map(), running = new Map();
  let open = 0, failed = null;
  const tell = () => report(open > 0, failed && failed.text, failed && failed.again);
  const pause = (ms, signal) => new Promise((done, stop) => {
    const timer = setTimeout(done, ms);
    signal.addEventListener("abort", () => { clearTimeout(timer); stop(signal.reason); }, { once: true });
  });
  const answer = async (address, signal) => {
    for (let tries = 1; ; tries += 1) {
      const found = await fetch(address, { signal, cache: "no-store", credentials: "omit", referrerPolicy: "no-referrer" });
      if (found.status === 429 && tries < TRIES) {
        await pause(100 * 2 ** tries, signal);
        continue;
      }
      const said = await found.json().catch(() => ({}));
      if (!found.ok) throw new Error(said.error || `the server answered ${found.status}`);
      return said;
    }
  };
  const stop = (kind) => { running.get(kind)?.abort(new DOMException("newer", "AbortError")); };
  // Calls back with the answer, at once if it is known; never with one that was overtaken.
  const ask = async (kind, what, given, then) => {
    stop(kind);
    running.delete(kind);
    const address = `${what}?${new URLSearchParams(given)}`;
    if (failed && failed.kind === kind) { failed = null; tell(); }
    if (kept.has(address)) { then(kept.get(address)); return; }
    const control = new AbortController();
    running.set(kind, control);
    open += 1;
    tell();
    let said = null;
    try {
      if (kind === "values") await pause(60, control.signal); // a slider says many values on its way
      said = await answer(address, control.signal);
    } catch (error) {
      if (error.name !== "AbortError") {
        const text = error instanceof TypeError ? "the server can't be reached; is actstore serve still running?" : error.message;
        failed = { kind, text, again: () => ask(kind, what, given, then) };
      }
    }
    open -= 1;
    if (running.get(kind) === control) running.delete(kind);
    if (said !== null && !control.signal.aborted) {
      kept.set(address, said);
      if (kept.size > KEPT) kept.delete(kept.keys().next().value);
      then(said);
    }
    tell();
  };
  return { ask, stop };
};
