"use strict";
// Loaded before the first paint, so that a chosen theme does not flash in the other one.
try {
  const theme = localStorage.getItem("gptoss.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // storage is blocked: the system's theme
}
