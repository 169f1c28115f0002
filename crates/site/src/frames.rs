//! A substrate on its way from a site: bytes in frames, and an end that says whether it is whole.
//!
//! ```text
//! u32 length (1 to 1 MiB) | bytes                        as many as it takes, little-endian
//! u32 0 | u64 bytes in all | 32 bytes BLAKE3 of them     the end of a whole one
//! u32 0xffff_ffff | u32 length | Fault as JSON           the site gave up: why
//! ```
//!
//! A stream that ends with neither broke off.

use std::io::{ErrorKind, Read, Write};

use bytes::Bytes;
use godwit_types::{Code, Fault, Name};
use tokio::io::{AsyncRead, AsyncReadExt};

use super::ByteStream;

/// Bytes in the largest frame.
const MAX_FRAME: usize = 1 << 20;
/// Bytes in the frames made here.
const FRAME: usize = 256 << 10;
/// Bytes in the longest failure.
/// How long a site may be silent in the midst of a stream: it reads a whole substrate before it sends
/// the first byte.
const SILENCE: std::time::Duration = std::time::Duration::from_secs(300);
const MAX_FAULT: usize = 64 << 10;
const FAILED: u32 = u32::MAX;

/// The sending end; [`FrameWriter::end`] makes it whole.
pub(crate) struct FrameWriter<W: Write> {
    out: W,
    held: Vec<u8>,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<W: Write> FrameWriter<W> {
    pub(crate) fn new(out: W) -> Self {
        Self { out, held: Vec::with_capacity(FRAME), hasher: blake3::Hasher::new(), bytes: 0 }
    }

    fn put(&mut self) -> std::io::Result<()> {
        if self.held.is_empty() {
            return Ok(());
        }
        self.out.write_all(&(self.held.len() as u32).to_le_bytes())?;
        self.out.write_all(&self.held)?;
        self.hasher.update(&self.held);
        self.bytes += self.held.len() as u64;
        self.held.clear();
        Ok(())
    }

    /// Says that all has been written, or why not.
    pub(crate) fn end(mut self, outcome: Result<(), &Fault>) -> std::io::Result<()> {
        match outcome {
            Ok(()) => {
                self.put()?;
                self.out.write_all(&0u32.to_le_bytes())?;
                self.out.write_all(&self.bytes.to_le_bytes())?;
                self.out.write_all(self.hasher.finalize().as_bytes())?;
            }
            Err(fault) => {
                let mut text = serde_json::to_vec(fault)?;
                if text.len() > MAX_FAULT {
                    text = serde_json::to_vec(&Fault::new(fault.code, "it failed; see its log"))?;
                }
                self.out.write_all(&FAILED.to_le_bytes())?;
                self.out.write_all(&(text.len() as u32).to_le_bytes())?;
                self.out.write_all(&text)?;
            }
        }
        self.out.flush()
    }
}

impl<W: Write> Write for FrameWriter<W> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = buf.len().min(FRAME - self.held.len());
        self.held.extend_from_slice(&buf[..n]);
        if self.held.len() == FRAME {
            self.put()?;
        }
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.put()?;
        self.out.flush()
    }
}

/// A substrate on its way to a site: frames as above, without a checksum, since all that is in them
/// is checked against hashes; and an end that says whether the sender gave it up.
///
/// ```text
/// u32 length (1 to 1 MiB) | bytes      as many as it takes
/// u32 0xffff_ffff                      given up: nothing of it is to be kept
/// ```
pub(crate) struct PartReader<R> {
    from: R,
    left: usize,
}

/// The bytes before those of a part.
pub fn part_head(bytes: &[u8]) -> [u8; 4] {
    (bytes.len() as u32).to_le_bytes()
}

/// What says that nothing of what was sent is to be kept.
pub const GIVEN_UP: [u8; 4] = FAILED.to_le_bytes();

impl<R: Read> PartReader<R> {
    pub(crate) const fn new(from: R) -> Self {
        Self { from, left: 0 }
    }
}

impl<R: Read> Read for PartReader<R> {
    fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
        if self.left == 0 {
            let mut head = [0; 4];
            self.from.read_exact(&mut head)?;
            self.left = match u32::from_le_bytes(head) {
                FAILED => {
                    return Err(std::io::Error::new(ErrorKind::ConnectionAborted, "given up"));
                }
                n if (1..=MAX_FRAME).contains(&(n as usize)) => n as usize,
                _ => return Err(std::io::Error::new(ErrorKind::InvalidData, "no such frame")),
            };
        }
        let n = buf.len().min(self.left);
        let n = self.from.read(&mut buf[..n])?;
        self.left -= n;
        Ok(n)
    }
}

/// The receiving end.
pub struct FrameReader<R = ByteStream> {
    from: R,
    site: Name,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Reads what `site` sends.
    pub fn new(from: R, site: Name) -> Self {
        Self { from, site, hasher: blake3::Hasher::new(), bytes: 0 }
    }

    /// The next bytes; `None` after the end of a whole stream.
    ///
    /// # Errors
    /// Why the site gave up; a stream that broke off, or is not what was sent.
    pub async fn next(&mut self) -> Result<Option<Bytes>, Fault> {
        match u32::from_le_bytes(self.take().await?) {
            0 => {
                let bytes = u64::from_le_bytes(self.take().await?);
                let sum: [u8; 32] = self.take().await?;
                if bytes != self.bytes || sum != *self.hasher.finalize().as_bytes() {
                    return Err(self.bad("sent other bytes than it says it did"));
                }
                Ok(None)
            }
            FAILED => {
                let text = u32::from_le_bytes(self.take().await?) as usize;
                if text > MAX_FAULT {
                    return Err(self.bad("gave up and says too much of why"));
                }
                let text = self.take_many(text).await?;
                Err(match serde_json::from_slice::<Fault>(&text) {
                    Ok(f) => {
                        let f = super::bounds::fault(f);
                        Fault { message: format!("site '{}': {}", self.site, f.message), ..f }
                    }
                    Err(_) => self.bad("gave up and does not say why"),
                })
            }
            n if n as usize <= MAX_FRAME => {
                let frame = self.take_many(n as usize).await?;
                self.hasher.update(&frame);
                self.bytes += frame.len() as u64;
                Ok(Some(frame.into()))
            }
            _ => Err(self.bad("sent a frame that is too long")),
        }
    }

    async fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        let mut out = [0; N];
        self.fill(&mut out).await?;
        Ok(out)
    }

    async fn take_many(&mut self, n: usize) -> Result<Vec<u8>, Fault> {
        let mut out = vec![0; n];
        self.fill(&mut out).await?;
        Ok(out)
    }

    async fn fill(&mut self, out: &mut [u8]) -> Result<(), Fault> {
        let read = tokio::time::timeout(SILENCE, self.from.read_exact(out)).await;
        let silent = |_| Err(std::io::ErrorKind::TimedOut.into());
        read.unwrap_or_else(silent).map(drop).map_err(|e| self.cut(&e))
    }

    fn cut(&self, e: &std::io::Error) -> Fault {
        let words = format!("the stream from site '{}' broke off: {e}", self.site);
        Fault::unavailable(words).hint("ask again; is it there? godwit site list")
    }

    fn bad(&self, what: &str) -> Fault {
        Fault::new(Code::Damaged, format!("site '{}' {what}", self.site))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    async fn read_all(bytes: &[u8]) -> Result<Vec<u8>, Fault> {
        let mut from = FrameReader::new(bytes, Name::new("cafe").unwrap());
        let mut out = Vec::new();
        while let Some(part) = from.next().await? {
            out.extend_from_slice(&part);
        }
        Ok(out)
    }

    #[tokio::test]
    async fn only_a_whole_stream_ends_well() {
        let content: Vec<u8> = (0..700_000u32).map(|n| (n / 7) as u8).collect();
        let mut sent = Vec::new();
        let mut to = FrameWriter::new(&mut sent);
        to.write_all(&content).unwrap();
        to.end(Ok(())).unwrap();
        assert_eq!(read_all(&sent).await.unwrap(), content);
        for cut in [0, 3, 4, 5, FRAME, FRAME + 4, FRAME + 9, sent.len() - 44, sent.len() - 1] {
            let f = read_all(&sent[..cut]).await.unwrap_err();
            assert_eq!(f.code, Code::Unavailable, "{cut}: {f}");
            assert!(f.message.contains("'cafe' broke off"), "{f}");
        }
        for at in [0, 2, 100, FRAME + 4, FRAME + 5, sent.len() - 40, sent.len() - 1] {
            let mut bad = sent.clone();
            bad[at] ^= 0x40;
            let _ = read_all(&bad).await.unwrap_err();
        }
    }

    #[tokio::test]
    async fn a_site_that_abandons_a_stream_is_noticed() {
        let why = Fault::new(Code::Damaged, "unit 12 in pack 3 is damaged");
        let mut sent = Vec::new();
        let mut to = FrameWriter::new(&mut sent);
        to.write_all(b"the first half").unwrap();
        to.end(Err(&why)).unwrap();
        let f = read_all(&sent).await.unwrap_err();
        assert_eq!(
            (f.code, f.message.as_str()),
            (Code::Damaged, "site 'cafe': unit 12 in pack 3 is damaged")
        );
    }
}
