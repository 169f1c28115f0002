//! When a typed letter is on a screen: by the pixels of the letter itself.
//!
//! A letter is learnt from a screen before it was typed and one after, pixels that change by
//! themselves (a blinking caret) left out. It is seen again when those pixels are what they were;
//! neither a caret nor a picture that changes elsewhere counts.

use std::time::Instant;

/// A letter is at least this wide and high, in pixels: a caret is narrower.
const LEAST: (usize, usize) = (4, 5);
/// A letter, with a caret that has moved over it, is at most this wide and high.
const MOST: (usize, usize) = (48, 48);
/// A letter has at least so many pixels.
const INK: usize = 12;
/// Share of a letter's pixels that must be right for it to be seen: a caret may lie over its edge.
const SHARE: f64 = 0.9;

/// Colours that a drawn desktop has at least; a text console and an empty desktop have fewer.
pub(super) const DESKTOP_COLOURS: usize = 150;

/// A screen: pixels in rows, 0xRRGGBB.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Frame {
    pub(super) width: usize,
    pub(super) pixels: Vec<u32>,
}

/// A rectangle of a screen that was drawn anew.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Patch {
    pub(super) x: usize,
    pub(super) y: usize,
    pub(super) width: usize,
    pub(super) pixels: Vec<u32>,
}

/// Rectangles that came together, and when.
#[derive(Debug, Clone)]
pub(super) struct Update {
    pub(super) at: Instant,
    pub(super) patches: Vec<Patch>,
    /// The screen's size from now on, where it has changed: width and height.
    pub(super) size: Option<(usize, usize)>,
}

impl Frame {
    pub(super) fn new(width: usize, height: usize) -> Self {
        Self { width, pixels: vec![0; width * height] }
    }

    /// Whether it shows a desktop with something on it: a letter on a text console is none.
    pub(super) fn drawn(&self) -> bool {
        let mut colours = std::collections::HashSet::new();
        self.pixels.iter().any(|p| colours.insert(*p) && colours.len() >= DESKTOP_COLOURS)
    }

    /// Draws an update; tells which pixels are others now.
    pub(super) fn draw(&mut self, update: &Update, mut changed: impl FnMut(usize)) {
        if let Some((width, height)) = update.size {
            *self = Self::new(width, height);
        }
        for p in &update.patches {
            for (row, line) in p.pixels.chunks(p.width.max(1)).enumerate() {
                let from = (p.y + row) * self.width + p.x;
                for (i, value) in line.iter().enumerate() {
                    if p.x + i >= self.width {
                        break;
                    }
                    if let Some(slot) = self.pixels.get_mut(from + i)
                        && *slot != *value
                    {
                        *slot = *value;
                        changed(from + i);
                    }
                }
            }
        }
    }
}

/// The pixels of a letter on a screen of one width.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Glyph {
    width: usize,
    /// Where, and what is there with the letter.
    ink: Vec<(usize, u32)>,
}

impl Glyph {
    /// The letter by which `after` differs from `before`. `restless` are pixels that change by
    /// themselves. `None` when the difference is no letter: nothing, a caret, or a large picture.
    pub(super) fn learn(before: &Frame, after: &Frame, restless: &[bool]) -> Option<Self> {
        if before.width != after.width || before.pixels.len() != after.pixels.len() {
            return None;
        }
        let pairs = before.pixels.iter().zip(&after.pixels).enumerate();
        let ink: Vec<(usize, u32)> = pairs
            .filter(|(i, (a, b))| a != b && !restless.get(*i).copied().unwrap_or(false))
            .map(|(i, (_, b))| (i, *b))
            .collect();
        let (w, h) = extent(ink.iter().map(|(i, _)| (i % after.width, i / after.width)))?;
        let fits = w >= LEAST.0 && h >= LEAST.1 && w <= MOST.0 && h <= MOST.1 && ink.len() >= INK;
        fits.then_some(Self { width: after.width, ink })
    }

    /// Whether the letter is on the screen.
    pub(super) fn on(&self, screen: &Frame) -> bool {
        let right = |(i, value): &&(usize, u32)| screen.pixels.get(*i) == Some(value);
        let count = self.ink.iter().filter(right).count();
        screen.width == self.width && count as f64 >= SHARE * self.ink.len() as f64
    }

    /// Whether nothing of the letter is there: its pixels are those of a screen without it.
    pub(super) fn off(&self, screen: &Frame) -> bool {
        let right = |(i, value): &&(usize, u32)| screen.pixels.get(*i) == Some(value);
        let count = self.ink.iter().filter(right).count();
        (count as f64) <= (1.0 - SHARE) * self.ink.len() as f64
    }

    /// When it first was on the screen that `first` and then `updates` show.
    pub(super) fn first_seen(&self, first: &Frame, updates: &[Update]) -> Option<Instant> {
        let mut screen = first.clone();
        updates.iter().find_map(|u| {
            screen.draw(u, |_| {});
            self.on(&screen).then_some(u.at)
        })
    }
}

/// Width and height of the box around points; none without one.
fn extent(points: impl Iterator<Item = (usize, usize)>) -> Option<(usize, usize)> {
    let (mut least, mut most) = ((usize::MAX, usize::MAX), (0, 0));
    let mut any = false;
    for (x, y) in points {
        any = true;
        least = (least.0.min(x), least.1.min(y));
        most = (most.0.max(x), most.1.max(y));
    }
    any.then(|| (most.0 - least.0 + 1, most.1 - least.1 + 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAPER: u32 = 0xff_ff_ff;

    fn paper() -> Frame {
        Frame { width: 100, pixels: vec![PAPER; 100 * 60] }
    }

    fn bar(x: usize, width: usize, height: usize, value: u32) -> Update {
        let patch = Patch { x, y: 20, width, pixels: vec![value; width * height] };
        Update { at: Instant::now(), patches: vec![patch], size: None }
    }

    fn drawn(updates: &[Update]) -> Frame {
        let mut f = paper();
        updates.iter().for_each(|u| f.draw(u, |_| {}));
        f
    }

    #[test]
    fn a_letter_is_learnt_and_seen_and_a_blinking_caret_is_neither() {
        let caret = bar(10, 1, 14, 0);
        let letter = bar(10, 8, 10, 0x20_20_20);
        let moved = bar(20, 1, 14, 0);
        assert_eq!(Glyph::learn(&paper(), &drawn(std::slice::from_ref(&caret)), &[]), None);
        assert_eq!(Glyph::learn(&paper(), &paper(), &[]), None);
        assert_eq!(Glyph::learn(&paper(), &drawn(&[bar(0, 100, 40, 7)]), &[]), None, "a window");

        // Before, the caret is where the letter will be; behind it, it may be on or off.
        let mut restless = vec![false; 6000];
        (20..34).for_each(|y| restless[y * 100 + 20] = true);
        let before = drawn(std::slice::from_ref(&caret));
        let after = drawn(&[letter.clone(), moved.clone()]);
        let glyph = Glyph::learn(&before, &after, &restless).expect("a letter");
        assert!(glyph.on(&after) && glyph.on(&drawn(std::slice::from_ref(&letter))));
        for without in
            [paper(), drawn(std::slice::from_ref(&caret)), drawn(std::slice::from_ref(&moved))]
        {
            assert!(glyph.off(&without) && !glyph.on(&without));
        }

        let updates = [caret, moved, letter, bar(60, 3, 3, 9)];
        assert_eq!(glyph.first_seen(&paper(), &updates), Some(updates[2].at));
        assert_eq!(glyph.first_seen(&paper(), &updates[..2]), None);
    }

    #[test]
    fn a_screen_of_another_size_shows_no_letter_and_patches_stay_inside() {
        let letter = bar(10, 8, 10, 0);
        let glyph =
            Glyph::learn(&paper(), &drawn(std::slice::from_ref(&letter)), &[]).expect("a letter");
        let grown = Update { at: Instant::now(), patches: Vec::new(), size: Some((120, 50)) };
        let mut f = drawn(&[letter]);
        f.draw(&grown, |_| {});
        assert!(!glyph.on(&f) && f.pixels.len() == 6000);
        let mut touched = 0;
        f.draw(&bar(118, 8, 60, 5), |_| touched += 1);
        assert_eq!(touched, 2 * 30, "what lies outside is left out");
        assert!(!f.drawn());
        f.pixels.iter_mut().zip(0..).for_each(|(p, colour)| *p = colour % 200);
        assert!(f.drawn());
    }
}
