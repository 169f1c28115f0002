//! Screen and keyboard.

use std::io::Read;
use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};

use super::Machine;
use super::life::Action;
use crate::confine;
use crate::error::QemuError;
use crate::keys::{Key, KeyStroke, strokes};

/// Largest screenshot that is read, in bytes.
const SCREEN_MAX: u64 = 64 << 20;

/// A picture of the screen.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Screenshot {
    /// Width in pixels.
    pub width: u32,
    /// Height in pixels.
    pub height: u32,
    /// The picture as a PNG file.
    pub png: Vec<u8>,
}

impl Screenshot {
    fn of(png: Vec<u8>) -> Result<Self, QemuError> {
        let bad = || QemuError::Unexpected {
            what: "a screenshot",
            why: format!("{} bytes that are no PNG", png.len()),
        };
        let head = png.get(..24).filter(|h| h.starts_with(b"\x89PNG\r\n\x1a\n")).ok_or_else(bad)?;
        let number =
            |at: usize| u32::from_be_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        Ok(Self { width: number(16), height: number(20), png })
    }
}

impl Machine {
    /// Time between two strokes of [`Machine::send_text`]: a guest's input queue is short, and
    /// what does not fit is lost.
    pub const STROKE: Duration = Duration::from_millis(30);

    /// Takes a picture of the screen, whether the machine runs or not.
    ///
    /// # Errors
    /// A machine without a display.
    pub async fn screenshot(&self) -> Result<Screenshot, QemuError> {
        let _one = self.inner.changing.lock().await;
        let path = &self.inner.paths.screen;
        if let Some(uid) = self.user() {
            confine::make_file(path, uid)?;
        }
        let arguments = json!({
            "filename": path.to_string_lossy(), "format": "png", "device": "vga",
        });
        self.qmp("screendump", arguments).await?;
        let png = read_bounded(path).map_err(QemuError::file("reading the screenshot", path))?;
        // The next one would replace it anyway.
        let _ = std::fs::remove_file(path);
        Screenshot::of(png)
    }

    /// Types `text` on a US keyboard, one stroke each [`Machine::STROKE`].
    ///
    /// # Errors
    /// A character without a key (nothing is typed then), or a machine that does not run.
    pub async fn send_text(&self, text: &str) -> Result<(), QemuError> {
        let strokes = strokes(text)?;
        self.allowed(Action::Type).await?;
        for stroke in strokes {
            self.send_stroke(stroke).await?;
            tokio::time::sleep(Self::STROKE).await;
        }
        Ok(())
    }

    /// Presses and releases one key.
    ///
    /// # Errors
    /// A machine that does not run.
    pub async fn send_stroke(&self, stroke: KeyStroke) -> Result<(), QemuError> {
        let shift = Key("shift");
        let mut events = Vec::new();
        if stroke.shift {
            events.push(key_event(shift, true));
        }
        events.extend([key_event(stroke.key, true), key_event(stroke.key, false)]);
        if stroke.shift {
            events.push(key_event(shift, false));
        }
        self.qmp("input-send-event", json!({ "events": events })).await.map(drop)
    }

    /// Presses `keys` together and releases them, the last one first, such as control and s.
    ///
    /// # Errors
    /// A machine that does not run, or a key that QEMU does not know.
    pub async fn send_chord(&self, keys: &[Key]) -> Result<(), QemuError> {
        self.allowed(Action::Type).await?;
        let down = keys.iter().map(|&k| key_event(k, true));
        let up = keys.iter().rev().map(|&k| key_event(k, false));
        let events: Vec<Value> = down.chain(up).collect();
        self.qmp("input-send-event", json!({ "events": events })).await.map(drop)
    }
}

fn key_event(key: Key, down: bool) -> Value {
    json!({ "type": "key", "data": { "down": down, "key": { "type": "qcode", "data": key.0 } } })
}

fn read_bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut out = Vec::new();
    std::fs::File::open(path)?.take(SCREEN_MAX).read_to_end(&mut out)?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_size_of_a_picture_is_read_and_the_rest_refused() {
        let mut png = b"\x89PNG\r\n\x1a\n\0\0\0\x0dIHDR".to_vec();
        png.extend([0, 0, 4, 0, 0, 0, 3, 0]);
        let shot = Screenshot::of(png.clone()).unwrap();
        assert_eq!((shot.width, shot.height), (1024, 768));
        assert!(Screenshot::of(png[..20].to_vec()).is_err());
        assert!(Screenshot::of(b"P6 1 1 255 .............".to_vec()).is_err());
    }
}
