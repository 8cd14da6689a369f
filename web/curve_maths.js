// Strength over sampling time: pure numbers, the same as diffscaler_core/schedule.py computes.
// A point is [percent, factor]; percent 0 is pure noise, 1 the picture.

/** @typedef {[percent: number, factor: number]} Point */
/** @typedef {"linear" | "step" | "smooth"} Interpolation */

/** The share of the change from one point to the next that is done at a share t in 0..1. */
export const INTERPOLATIONS = /** @type {Record<Interpolation, (t: number) => number>} */ ({
  linear: (t) => t,
  step: () => 0,
  smooth: (t) => t * t * (3 - 2 * t),
});

/** A percent comes from a sampler's float32, which must not miss its point by the last digit. */
const NEAR = 1e-6;
/** Straight pieces that a smooth stretch is drawn with. */
const PIECES = 24;

/**
 * Returns the factor at a percent; at a point exactly the point's.
 * @param {Point[]} points By percent, at least one.
 * @param {number} percent
 * @param {Interpolation} interpolation
 */
export function valueAt(points, percent, interpolation) {
  let after = points.findIndex(([at]) => at > percent + NEAR);
  if (after < 0) after = points.length;
  if (after === 0 || after === points.length) return points[Math.max(after - 1, 0)][1];
  const [start, first] = points[after - 1];
  const [end, last] = points[after];
  const share = Math.max(percent - start, 0) / (end - start);
  return first + (last - first) * INTERPOLATIONS[interpolation](share);
}

/**
 * Returns the corners of the drawn curve, from percent 0 to 1.
 * @param {Point[]} points By percent, at least one.
 * @param {Interpolation} interpolation
 * @returns {Point[]}
 */
export function polyline(points, interpolation) {
  // a step holds a jump's second factor at once: its first is nowhere
  const isStep = interpolation === "step";
  const met = isStep ? points.filter(([at], i) => points[i + 1]?.[0] !== at) : points;
  /** @type {Point[]} */
  const line = [[0, met[0][1]]];
  met.forEach(([percent, factor], i) => {
    const [start, first] = met[i - 1] ?? [percent, factor];
    if (isStep) line.push([percent, first]);
    if (interpolation === "smooth" && percent > start) {
      for (let piece = 1; piece < PIECES; piece++) {
        const share = piece / PIECES;
        const done = INTERPOLATIONS.smooth(share);
        line.push([start + (percent - start) * share, first + (factor - first) * done]);
      }
    }
    line.push([percent, factor]);
  });
  return [...line, [1, met[met.length - 1][1]]];
}

/**
 * Returns the curve of a window of sampling time.
 * @param {number} start Percent at which the task comes in.
 * @param {number} end Percent at which it goes.
 * @param {number} fade Percent it takes for either.
 * @returns {{points: Point[], interpolation: Interpolation}}
 * @throws {Error} No such window.
 */
export function windowCurve(start, end, fade) {
  if (!(start >= 0 && start < end && end <= 1)) {
    throw new Error(
      `a window is 0 <= start < end <= 1 of sampling time, got ${start} and ${end}`,
    );
  }
  const edges = Number(start > 0) + Number(end < 1);
  if (!(fade * edges >= 0 && fade * edges <= end - start + 1e-9)) {
    throw new Error(`${edges} fades of ${fade} do not fit a window from ${start} to ${end}`);
  }
  if (!fade) {
    /** @type {Point[]} */
    const points = start > 0 ? [[0, 0], [start, 1]] : [[0, 1]];
    if (end < 1) points.push([end, 0]);
    return { points, interpolation: "step" };
  }
  /** @type {Point[]} */
  const points = start > 0 ? [[start, 0], [Math.min(start + fade, end), 1]] : [[0, 1]];
  const risen = points[points.length - 1][0];
  if (end < 1) points.push([Math.max(end - fade, risen), 1], [end, 0]);
  return { points, interpolation: "linear" };
}

/**
 * Returns points that draw the same curve under any interpolation, steps as jumps; null if none do.
 * @param {{points: Point[], interpolation: Interpolation}} curve
 * @param {Interpolation} wanted
 * @returns {Point[] | null}
 */
export function asPoints({ points, interpolation }, wanted) {
  if (interpolation === wanted || points.length === 1) return points;
  if (interpolation !== "step") return null;
  return points.flatMap(([percent, factor], i) =>
    /** @type {Point[]} */ (i ? [[percent, points[i - 1][1]], [percent, factor]] : [[percent, factor]]));
}
