//! Lines from a guest.

use tokio::io::AsyncReadExt;
use tokio::net::UnixStream;

use super::exec::ExecOutput;

/// Longest line taken from a guest, in bytes: two outputs in base64 and what is around them.
const MAX_LINE: usize = 2 * (ExecOutput::MAX_BYTES / 3 + 1) * 4 + (1 << 20);
/// Room for one read, in bytes.
const READ: usize = 16 << 10;

/// Bytes from the guest, cut into lines. The rest of a line that is too long is thrown away as it
/// comes, so that the next one can be read.
#[derive(Debug, Default)]
pub(super) struct Frames {
    buf: Vec<u8>,
    scanned: usize,
    skipping: bool,
}

impl Frames {
    fn next(&mut self) -> std::io::Result<Option<Vec<u8>>> {
        loop {
            let end = self.buf[self.scanned..].iter().position(|&b| b == b'\n');
            let Some(at) = end.map(|at| at + self.scanned) else {
                self.scanned = self.buf.len();
                if self.skipping || self.buf.len() > MAX_LINE {
                    self.scanned = 0;
                    self.buf = Vec::new();
                    if !std::mem::replace(&mut self.skipping, true) {
                        return Err(std::io::Error::new(
                            std::io::ErrorKind::InvalidData,
                            "the guest sends a line without end",
                        ));
                    }
                }
                return Ok(None);
            };
            let mut line: Vec<u8> = self.buf.drain(..=at).collect();
            self.scanned = 0;
            line.pop();
            if !std::mem::take(&mut self.skipping) {
                return Ok(Some(line));
            }
        }
    }
}

/// The next line; nothing is lost when it is given up and called again.
pub(super) async fn next_line(
    stream: &mut UnixStream,
    frames: &mut Frames,
) -> std::io::Result<Vec<u8>> {
    loop {
        if let Some(line) = frames.next()? {
            return Ok(line);
        }
        frames.buf.reserve(READ);
        if stream.read_buf(&mut frames.buf).await? == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_without_end_is_refused_once_and_the_next_one_is_read() {
        let mut frames = Frames::default();
        let part = vec![b'x'; 1 << 20];
        let mut refused = 0;
        for _ in 0..((2 * MAX_LINE) >> 20) {
            frames.buf.extend_from_slice(&part);
            refused += usize::from(frames.next().is_err());
        }
        assert_eq!(refused, 1);
        assert!(frames.buf.len() <= MAX_LINE, "a line without end is kept");
        frames.buf.extend_from_slice(b"xx\n{}\nrest");
        assert_eq!(frames.next().unwrap().unwrap(), b"{}");
        assert_eq!(frames.next().unwrap(), None);
        frames.buf.extend_from_slice(b"!\n");
        assert_eq!(frames.next().unwrap().unwrap(), b"rest!");
    }
}
