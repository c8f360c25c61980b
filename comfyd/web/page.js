// Keeps the status page as it is now: fetches the same page again and puts its parts in place.
// What comes was escaped by the daemon, and a parsed document runs nothing.
"use strict";
(() => {
  const EVERY_MS = 2000;
  const PATIENCE_MS = 10000;
  const live = document.getElementById("live");
  const script = document.querySelector("script").textContent;
  let heard = Date.now();
  let timer = 0;

  function say(kind, words) {
    if (live.className !== kind) live.className = kind;
    if (live.textContent !== words) live.textContent = words;
  }

  // Someone who marks a name in order to copy it must not lose it.
  function isMarked(part) {
    const marked = document.getSelection();
    return !marked.isCollapsed && marked.containsNode(part, true);
  }

  function put(next) {
    document.title = next.title;
    for (const part of document.querySelectorAll("[data-part]")) {
      const news = next.getElementById(part.id);
      if (!news || part.isEqualNode(news) || isMarked(part)) continue;
      const focused = part.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
      part.className = news.className;
      part.hidden = news.hidden;
      part.replaceChildren(...news.childNodes);
      if (focused !== null) {
        for (const link of part.querySelectorAll("a")) {
          if (link.getAttribute("href") === focused) { link.focus({ preventScroll: true }); break; }
        }
      }
    }
  }

  async function look() {
    try {
      const answer = await fetch(location.pathname, { cache: "no-store", signal: AbortSignal.timeout(PATIENCE_MS) });
      if (!answer.ok) throw new Error(String(answer.status));
      const next = new DOMParser().parseFromString(await answer.text(), "text/html");
      if (next.querySelector("script")?.textContent !== script) { location.reload(); return; }
      put(next);
      heard = Date.now();
      say("on", "live");
    } catch {
      say("lost", `no answer for ${Math.round((Date.now() - heard) / 1000)} s: what you see is old`);
    }
    again(EVERY_MS);
  }

  function again(afterMs) {
    clearTimeout(timer);
    if (!document.hidden) timer = setTimeout(look, afterMs);
  }

  document.addEventListener("visibilitychange", () => again(0));
  say("on", "live");
  again(EVERY_MS);
})();
