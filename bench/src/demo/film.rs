//! The moving picture of a move: somebody types, the machine moves, the typing goes on.
//!
//! What is seen is what a viewer of the machine's display gets, by its own clock. The picture is an
//! SVG whose parts appear one after the other and begin anew at its end: the first screen as a PNG,
//! then each rectangle that changed, and below it a line that says what happens.

use std::fmt::Write;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;

use super::display::Display;
use super::glyph::Frame;
use super::report::Move;
use super::world::World;

/// What is typed, again and again.
const TEXT: &str = "Whoever types here is not asked to wait while the machine moves on. ";
/// Time between two key strokes.
const STROKE: Duration = Duration::from_millis(250);
/// How long is typed before the move.
pub(super) const ALONE: Duration = Duration::from_secs(3);
/// How long a display may be away while its machine moves.
const AWAY: Duration = Duration::from_secs(60);
/// How long somebody types on once the machine needs nothing of where it was.
const AFTERWARDS: Duration = Duration::from_secs(4);
/// How long the end is shown.
const END: Duration = Duration::from_secs(3);
/// The longest film, its end included: of a longer move only the beginning is shown.
const LONGEST: Duration = Duration::from_secs(20);
/// The largest picture, in bytes.
const MOST: usize = 2_000_000;
/// Height of the line below the screen, in pixels.
const LINE: usize = 56;

/// A part of the screen that was drawn anew.
#[derive(Debug, PartialEq, Eq)]
struct Patch {
    at: Duration,
    x: usize,
    y: usize,
    width: usize,
    pixels: Vec<u32>,
}

/// What has been seen so far.
pub(super) struct Film {
    began: Instant,
    first: Frame,
    last: Frame,
    patches: Vec<Patch>,
    /// What happens, from when on.
    lines: Vec<(Duration, String)>,
    /// When the filming ended.
    ended: Option<Duration>,
}

impl Film {
    fn new(first: Frame) -> Self {
        let last = first.clone();
        let (patches, lines) = (Vec::new(), Vec::new());
        Self { began: Instant::now(), first, last, patches, lines, ended: None }
    }

    /// How long it is by now.
    fn length(&self) -> Duration {
        self.ended.unwrap_or_else(|| self.began.elapsed()).min(LONGEST.saturating_sub(END))
    }

    /// Whether it takes no more.
    fn is_full(&self) -> bool {
        self.length() >= LONGEST.saturating_sub(END)
    }

    /// From now on this happens.
    fn says(&mut self, line: String) {
        self.lines.push((self.length(), line));
    }

    /// Adds what has changed on the screen by `at`; one of another size is left out, and what comes
    /// after the longest film.
    fn add(&mut self, at: Instant, now: &Frame) {
        let at = at.saturating_duration_since(self.began);
        let width = self.last.width;
        if at + END > LONGEST {
            return;
        }
        if now.width != width || now.pixels.len() != self.last.pixels.len() {
            return;
        }
        let changed = now.pixels.iter().zip(&self.last.pixels).enumerate();
        let changed = changed.filter(|(_, (now, last))| now != last).map(|(i, _)| i);
        let bounds = changed.fold(None, |bounds: Option<[usize; 4]>, i| {
            let (x, y) = (i % width, i / width);
            let [left, top, right, bottom] = bounds.unwrap_or([x, y, x, y]);
            Some([left.min(x), top.min(y), right.max(x), bottom.max(y)])
        });
        let Some([x, y, right, bottom]) = bounds else { return };
        let rows = (y..=bottom).map(|row| row * width);
        let pixels = rows.flat_map(|row| &now.pixels[row + x..=row + right]).copied().collect();
        self.patches.push(Patch { at, x, y, width: right - x + 1, pixels });
        self.last = now.clone();
    }

    /// The whole as an SVG that is `length` long.
    fn to_svg(&self, length: Duration) -> anyhow::Result<String> {
        let (width, height) = (self.first.width, self.first.pixels.len() / self.first.width.max(1));
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {0}\" width=\"{width}\" \
             height=\"{0}\">\n\
             <rect width=\"{width}\" height=\"{0}\" fill=\"#1b1f24\"><animate id=\"film\" \
             attributeName=\"opacity\" from=\"1\" to=\"1\" dur=\"{1:.2}s\" begin=\"0s;film.end\"/></rect>\n",
            height + LINE,
            length.as_secs_f64()
        );
        let picture =
            |svg: &mut String, at: (usize, usize), width: usize, pixels: &[u32], show: &str| {
                let height = pixels.len() / width.max(1);
                let png = STANDARD.encode(png_of(width, pixels)?);
                let (x, y) = at;
                writeln!(
                    svg,
                    "<image x=\"{x}\" y=\"{y}\" width=\"{width}\" height=\"{height}\" \
                 href=\"data:image/png;base64,{png}\"{show}"
                )
                .context("write a picture")
            };
        picture(&mut svg, (0, 0), width, &self.first.pixels, "/>")?;
        for patch in &self.patches {
            let show = format!(" visibility=\"hidden\">{}</image>", shown(patch.at, None));
            picture(&mut svg, (patch.x, patch.y), patch.width, &patch.pixels, &show)?;
        }
        let ends = self.lines.iter().skip(1).map(|(at, _)| Some(*at)).chain([None]);
        for ((at, line), end) in self.lines.iter().zip(ends) {
            writeln!(
                svg,
                "<text x=\"16\" y=\"{}\" fill=\"#e6edf3\" font-family=\"monospace\" font-size=\"17\" \
                 visibility=\"hidden\">{}{}</text>",
                height + LINE / 2 + 6,
                escaped(line),
                shown(*at, end)
            )
            .context("write a line")?;
        }
        svg.push_str("</svg>\n");
        Ok(svg)
    }

    /// Ends with the figures of the move, and writes the picture.
    ///
    /// # Errors
    /// When it is larger than such a picture may be, or cannot be written.
    pub(super) fn write(mut self, of: &Move, path: &Path) -> anyhow::Result<()> {
        let bytes = of.link_bytes.map_or_else(|| "unknown".into(), godwit_types::human_bytes);
        self.says(format!(
            "down {}, longest stall {:.0} ms, {bytes} on the link, independent after {:.1} s",
            of.report.downtime_text(),
            of.signs.longest_stall_ms,
            of.report.total_ms / 1e3
        ));
        let svg = self.to_svg(self.length() + END)?;
        ensure!(svg.len() <= MOST, "a moving picture of {} bytes is more than {MOST}", svg.len());
        std::fs::write(path, svg).with_context(|| format!("write {}", path.display()))
    }
}

/// From when on something is shown, and until when: the end of the picture when not said.
fn shown(at: Duration, until: Option<Duration>) -> String {
    let end = until.map_or_else(
        || "film.end".to_owned(),
        |until| format!("film.begin+{:.2}s", until.as_secs_f64()),
    );
    let begin = at.as_secs_f64();
    format!(
        "<set attributeName=\"visibility\" to=\"visible\" begin=\"film.begin+{begin:.2}s\" end=\"{end}\"/>"
    )
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

fn png_of(width: usize, pixels: &[u32]) -> anyhow::Result<Vec<u8>> {
    let side = |n: usize| u32::try_from(n).context("a picture too large");
    let mut out = Vec::new();
    let mut encoder = png::Encoder::new(&mut out, side(width)?, side(pixels.len() / width.max(1))?);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::High);
    let mut writer = encoder.write_header().context("write a picture")?;
    let bytes: Vec<u8> =
        pixels.iter().flat_map(|p| [p >> 16, p >> 8, *p].map(|c| c as u8)).collect();
    writer.write_image_data(&bytes).context("write a picture")?;
    writer.finish().context("write a picture")?;
    Ok(out)
}

/// Somebody at the display of a machine who types, and sees what a film shows.
pub(super) struct Typist<'a> {
    world: &'a World,
    vm: &'a str,
    /// None while it is away.
    display: Option<Display>,
    keys: std::iter::Cycle<std::str::Bytes<'static>>,
    /// The key that was pressed last.
    last: u32,
    pub(super) film: Film,
}

impl<'a> Typist<'a> {
    /// Sits down at the display of `vm`.
    pub(super) async fn at(world: &'a World, vm: &'a str) -> anyhow::Result<Self> {
        let display = Display::open(world, vm).await?;
        let film = Film::new(display.frame().clone());
        Ok(Self { world, vm, display: Some(display), keys: TEXT.bytes().cycle(), last: 0, film })
    }

    /// From now on this happens.
    pub(super) fn says(&mut self, line: &str) {
        self.film.says(line.to_owned());
    }

    /// Types for so long.
    pub(super) async fn types_for(&mut self, length: Duration) -> anyhow::Result<()> {
        let until = Instant::now() + length;
        while Instant::now() < until {
            self.stroke().await?;
        }
        Ok(())
    }

    /// Types until `done` and a little longer, and gives what that gives; the film ends there, or when it
    /// is full. The stroke that is under way then is finished: half of one would spoil what the display is
    /// sent.
    pub(super) async fn types_until<T>(
        &mut self,
        done: impl Future<Output = anyhow::Result<T>>,
    ) -> anyhow::Result<T> {
        tokio::pin!(done);
        while !self.film.is_full() {
            let done = {
                let typed = self.stroke();
                tokio::pin!(typed);
                tokio::select! {
                    biased;
                    done = &mut done => {
                        typed.await?;
                        Some(done)
                    }
                    typed = &mut typed => {
                        typed?;
                        None
                    }
                }
            };
            if let Some(done) = done {
                self.types_for(AFTERWARDS).await?;
                self.film.ended = Some(self.film.length());
                return done;
            }
        }
        done.await
    }

    /// One key, and what is seen until the next; a display that went away with its machine is opened
    /// anew where that is now.
    async fn stroke(&mut self) -> anyhow::Result<()> {
        let Some(display) = &mut self.display else { return self.look_again().await };
        self.last = self.keys.next().context("text")?.into();
        let film = &mut self.film;
        if display.stroke(self.last, STROKE, |at, frame| film.add(at, frame)).await.is_err() {
            self.display = None;
        }
        Ok(())
    }

    async fn look_again(&mut self) -> anyhow::Result<()> {
        let deadline = Instant::now() + AWAY;
        let mut display = loop {
            match Display::open(self.world, self.vm).await {
                Ok(display) => break display,
                Err(e) if Instant::now() > deadline => return Err(e),
                Err(_) => tokio::time::sleep(STROKE).await,
            }
        };
        // It may be down where the machine is now.
        display.let_go(self.last).await?;
        self.film.add(Instant::now(), display.frame());
        self.display = Some(display);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(pixels: &[u32]) -> Frame {
        Frame { width: 4, pixels: pixels.to_vec() }
    }

    #[test]
    fn what_changes_is_shown_from_when_it_changed_on_and_nothing_else() {
        let mut film = Film::new(frame(&[0; 12]));
        let began = film.began;
        let at = |ms| began + Duration::from_millis(ms);
        let mut screen = [0; 12];
        film.add(at(500), &frame(&screen));
        assert_eq!(film.patches, []);
        (screen[5], screen[10]) = (0xff_0000, 0x00_ff00);
        film.add(at(1500), &frame(&screen));
        let pixels = vec![0xff_0000, 0, 0, 0x00_ff00];
        let patch = Patch { at: Duration::from_millis(1500), x: 1, y: 1, width: 2, pixels };
        assert_eq!(film.patches, [patch]);
        // A screen of another size is of another machine.
        film.add(at(1600), &Frame { width: 2, pixels: vec![7; 4] });
        // What comes after the longest film is not shown.
        film.add(at(20_000), &frame(&[9; 12]));
        assert_eq!(film.patches.len(), 1);
        film.ended = Some(LONGEST * 2);
        assert!(film.is_full());
        assert_eq!(film.length() + END, LONGEST);

        film.lines = vec![(Duration::ZERO, "a & b".into()), (Duration::from_secs(1), "c".into())];
        let svg = film.to_svg(Duration::from_secs(2)).expect("drawn");
        assert_eq!(svg.matches("<image ").count(), 2);
        assert_eq!(svg.matches("begin=\"film.begin+1.50s\" end=\"film.end\"").count(), 1, "{svg}");
        assert!(svg.contains(">a &amp; b<set"), "{svg}");
        assert!(svg.contains("begin=\"film.begin+0.00s\" end=\"film.begin+1.00s\""), "{svg}");
        assert!(svg.contains("dur=\"2.00s\" begin=\"0s;film.end\""), "{svg}");
        let drawn = png_of(2, &[1, 2, 3, 4]).expect("a picture");
        let mut reader = png::Decoder::new(std::io::Cursor::new(drawn)).read_info().expect("read");
        let mut raw = vec![0; reader.output_buffer_size().expect("small")];
        reader.next_frame(&mut raw).expect("decoded");
        assert_eq!(raw, [0, 0, 1, 0, 0, 2, 0, 0, 3, 0, 0, 4]);
    }
}
