/** Numbers and times as people read them; what is not known is a dash. */

const UNKNOWN = "–";
const SIZES = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB"];

/** Four digits that count. */
export function number(value) {
  if (value === null || value === undefined) return UNKNOWN;
  if (!Number.isFinite(value)) return Number.isNaN(value) ? "NaN" : value > 0 ? "inf" : "-inf";
  if (Number.isInteger(value) && Math.abs(value) < 1e7) return count(value);
  const size = Math.abs(value);
  return size >= 1e6 || size < 1e-4 ? value.toExponential(2) : String(Number(value.toPrecision(4)));
}

/** A whole number with its thousands apart. */
export function count(value) {
  return value === null || value === undefined ? UNKNOWN : value.toLocaleString("en");
}

/** "1 run", "2 runs". */
export function counted(value, unit) {
  return `${count(value)} ${unit}${value === 1 ? "" : "s"}`;
}

/** Seconds as "850 µs", "2.5 s", "3m07s", "26h00m". */
export function duration(seconds) {
  if (seconds === null || seconds === undefined) return UNKNOWN;
  if (seconds === 0) return "0 s";
  if (seconds < 0.001) return `${Number((seconds * 1e6).toPrecision(3))} µs`;
  if (seconds < 0.1) return `${Number((seconds * 1e3).toPrecision(3))} ms`;
  if (seconds < 59.95) return `${seconds.toFixed(1)} s`;
  const whole = Math.round(seconds);
  const [minutes, rest] = [Math.floor(whole / 60), whole % 60];
  if (minutes < 60) return `${minutes}m${String(rest).padStart(2, "0")}s`;
  return `${Math.floor(minutes / 60)}h${String(minutes % 60).padStart(2, "0")}m`;
}

/** A share in per cent. */
export function percent(value) {
  return value === null || value === undefined ? UNKNOWN : `${Number((value * 100).toFixed(1))} %`;
}

/** Bytes in the largest unit of which there is at least one. */
export function bytes(value) {
  if (value === null || value === undefined) return UNKNOWN;
  const power = value < 1024 ? 0 : Math.min(Math.floor(Math.log2(value) / 10), SIZES.length - 1);
  return `${Number((value / 1024 ** power).toPrecision(4))} ${SIZES[power]}`;
}

/** Seconds between two moments of the API; to now without the later. */
export function secondsBetween(earlier, later) {
  return Math.max(0, ((later ? Date.parse(later) : Date.now()) - Date.parse(earlier)) / 1000);
}

/** A moment by the reader's clock, to the second. */
export function moment(text) {
  if (!text) return UNKNOWN;
  const at = new Date(text);
  const two = (value) => String(value).padStart(2, "0");
  const day = `${at.getFullYear()}-${two(at.getMonth() + 1)}-${two(at.getDate())}`;
  return `${day} ${two(at.getHours())}:${two(at.getMinutes())}:${two(at.getSeconds())}`;
}

/** A moment by the reader's clock as charts read it, to the millisecond. */
export function localTime(text) {
  return `${moment(text)}.${String(new Date(text).getMilliseconds()).padStart(3, "0")}`;
}

/** How long ago a moment was. */
export function ago(text) {
  if (!text) return UNKNOWN;
  const seconds = secondsBetween(text);
  if (seconds < 5) return "just now";
  if (seconds < 60) return `${Math.floor(seconds)} s ago`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
  if (seconds < 48 * 3600) return `${Math.floor(seconds / 3600)} h ago`;
  return `${Math.floor(seconds / 86400)} days ago`;
}
