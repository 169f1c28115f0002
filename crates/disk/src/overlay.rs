//! Which blocks a running QEMU has in its overlay: an NBD client that asks for nothing but the
//! allocation of an export (NBD protocol, meta context `qemu:allocation-depth` of QEMU's
//! `docs/interop/nbd.rst`).
//!
//! ```text
//! greeting -> STRUCTURED_REPLY, SET_META_CONTEXT, GO -> (BLOCK_STATUS ..., FLUSH) again and again
//! ```
//!
//! The overlay's clusters are as large as blocks, so a cluster of its own is a block that the guest
//! has overwritten as a whole. What the layers below say of that block can't be seen any more, once
//! the overlay's tables are on disk: before that, a QEMU that dies takes the overwriting with it.
//! So a look ends with a flush, and only what was there before the flush is given.

use std::io;
use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use bytes::{Buf, BufMut, BytesMut};
use godwit_types::BLOCK_SIZE;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use crate::nbd_wire::*;

/// The export's meta context that tells in which layer a block lies.
const CONTEXT: &[u8] = b"qemu:allocation-depth";
/// How long QEMU may take for one answer.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// Depth of what lies in the exported node itself.
const OWN: u32 = 1;

/// The longest list of extents, in bytes.
const MAX_CHUNK: u32 = 8 << 20;
/// Bytes that one question is about; a multiple of the block size.
const AT_ONCE: u64 = 1 << 30;

/// A connection to a QEMU that exports its overlay.
#[derive(Debug)]
pub struct OverlayWatch {
    stream: UnixStream,
    bytes: u64,
    context: u32,
    cookie: u64,
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

async fn timely<T>(work: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(ANSWER_WITHIN, work).await.map_err(|_| io::ErrorKind::TimedOut)?
}

impl OverlayWatch {
    /// Connects to the export `export` on the unix socket `path`.
    ///
    /// # Errors
    /// If nobody listens there, or it offers no such export with its allocation depth.
    pub async fn connect(path: &Path, export: &str) -> io::Result<Self> {
        timely(async {
            let stream = UnixStream::connect(path).await?;
            let mut watch = Self { stream, bytes: 0, context: 0, cookie: 0 };
            watch.negotiate(export).await?;
            Ok(watch)
        })
        .await
    }

    /// Bytes of the disk.
    #[must_use]
    pub const fn bytes(&self) -> u64 {
        self.bytes
    }

    async fn negotiate(&mut self, export: &str) -> io::Result<()> {
        if self.stream.read_u64().await? != NBDMAGIC || self.stream.read_u64().await? != IHAVEOPT {
            return Err(broken("the NBD server's greeting is not newstyle"));
        }
        let flags = self.stream.read_u16().await?;
        if flags & FIXED_NEWSTYLE == 0 || flags & NO_ZEROES == 0 {
            return Err(broken("the NBD server is too old"));
        }
        self.stream.write_u32(u32::from(FIXED_NEWSTYLE | NO_ZEROES)).await?;

        self.option(OPT_STRUCTURED_REPLY, &[]).await?;
        if self.option_reply(OPT_STRUCTURED_REPLY).await?.0 != REP_ACK {
            return Err(broken("the NBD server has no structured replies"));
        }

        let mut asked = BytesMut::new();
        asked.put_u32(export.len() as u32);
        asked.put_slice(export.as_bytes());
        asked.put_u32(1);
        asked.put_u32(CONTEXT.len() as u32);
        asked.put_slice(CONTEXT);
        self.option(OPT_SET_META_CONTEXT, &asked).await?;
        let none = "the NBD server does not tell allocation depths";
        let (kind, data) = self.option_reply(OPT_SET_META_CONTEXT).await?;
        let id = data.split_first_chunk().filter(|(_, name)| *name == CONTEXT);
        let (REP_META_CONTEXT, Some((id, _))) = (kind, id) else { return Err(broken(none)) };
        self.context = u32::from_be_bytes(*id);
        if self.option_reply(OPT_SET_META_CONTEXT).await?.0 != REP_ACK {
            return Err(broken(none));
        }

        let mut asked = BytesMut::new();
        asked.put_u32(export.len() as u32);
        asked.put_slice(export.as_bytes());
        asked.put_u16(0);
        self.option(OPT_GO, &asked).await?;
        loop {
            let (kind, data) = self.option_reply(OPT_GO).await?;
            let mut data = &data[..];
            match kind {
                REP_ACK if self.bytes > 0 => return Ok(()),
                REP_INFO if data.len() >= 2 => {
                    if data.get_u16() == INFO_EXPORT && data.len() == 10 {
                        self.bytes = data.get_u64();
                    }
                }
                _ => return Err(broken("the NBD server does not offer that export")),
            }
        }
    }

    async fn option(&mut self, option: u32, data: &[u8]) -> io::Result<()> {
        let mut out = BytesMut::new();
        out.put_u64(IHAVEOPT);
        out.put_u32(option);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
        self.stream.write_all(&out).await
    }

    async fn option_reply(&mut self, option: u32) -> io::Result<(u32, Vec<u8>)> {
        let magic = self.stream.read_u64().await?;
        let (about, kind) = (self.stream.read_u32().await?, self.stream.read_u32().await?);
        let len = self.stream.read_u32().await?;
        if magic != OPTION_REPLY || about != option || len > MAX_OPTION {
            return Err(broken("the NBD server's reply to an option is not well-formed"));
        }
        let mut data = vec![0; len as usize];
        self.stream.read_exact(&mut data).await?;
        Ok((kind, data))
    }

    async fn request(&mut self, command: u16, offset: u64, len: u32) -> io::Result<()> {
        self.cookie += 1;
        let mut out = BytesMut::new();
        out.put_u32(REQUEST);
        out.put_u16(0);
        out.put_u16(command);
        out.put_u64(self.cookie);
        out.put_u64(offset);
        out.put_u32(len);
        self.stream.write_all(&out).await
    }

    /// Takes the whole reply to the request made last; extents of `(bytes, depth)` when there are.
    async fn reply(&mut self) -> io::Result<Vec<(u32, u32)>> {
        let mut extents = Vec::new();
        loop {
            let magic = self.stream.read_u32().await?;
            if magic == SIMPLE_REPLY {
                let (error, cookie) =
                    (self.stream.read_u32().await?, self.stream.read_u64().await?);
                self.check_cookie(cookie)?;
                return match error {
                    0 => Ok(extents),
                    _ => Err(io::Error::other(format!("the NBD server answered error {error}"))),
                };
            }
            if magic != STRUCTURED_REPLY {
                return Err(broken("an NBD reply lacks its magic"));
            }
            let (flags, kind) = (self.stream.read_u16().await?, self.stream.read_u16().await?);
            let cookie = self.stream.read_u64().await?;
            let len = self.stream.read_u32().await?;
            self.check_cookie(cookie)?;
            if len > MAX_CHUNK {
                return Err(broken("a chunk of an NBD reply is too long"));
            }
            let mut data = vec![0; len as usize];
            self.stream.read_exact(&mut data).await?;
            match kind {
                CHUNK_NONE => {}
                CHUNK_BLOCK_STATUS => self.take_extents(&data, &mut extents)?,
                k if k & CHUNK_IS_ERROR != 0 => {
                    let error = data.first_chunk().map_or(0, |e| u32::from_be_bytes(*e));
                    return Err(io::Error::other(format!("the NBD server answered error {error}")));
                }
                _ => return Err(broken("a chunk of an NBD reply is of an unknown kind")),
            }
            if flags & CHUNK_DONE != 0 {
                return Ok(extents);
            }
        }
    }

    fn check_cookie(&self, cookie: u64) -> io::Result<()> {
        match cookie == self.cookie {
            true => Ok(()),
            false => Err(broken("an NBD reply to another request")),
        }
    }

    fn take_extents(&self, data: &[u8], out: &mut Vec<(u32, u32)>) -> io::Result<()> {
        let mut data = data;
        if data.len() % 8 != 4 || data.get_u32() != self.context {
            return Err(broken("a block status of another context or length"));
        }
        while data.has_remaining() {
            let (len, depth) = (data.get_u32(), data.get_u32());
            if len == 0 {
                return Err(broken("an extent of no bytes"));
            }
            out.push((len, depth));
        }
        Ok(())
    }

    /// The blocks that the overlay has of its own, in order. They are on disk with all that leads
    /// to them: a QEMU that is killed does not lose them again.
    ///
    /// # Errors
    /// If the export has ended, or QEMU's answer is not well-formed; the connection is of no more
    /// use then.
    pub async fn settled(&mut self) -> io::Result<Vec<Range<u64>>> {
        let mut own: Vec<Range<u64>> = Vec::new();
        let mut at = 0;
        while at < self.bytes {
            let len = (self.bytes - at).min(AT_ONCE);
            let extents = timely(async {
                self.request(CMD_BLOCK_STATUS, at, len as u32).await?;
                self.reply().await
            })
            .await?;
            if extents.is_empty() {
                return Err(broken("a block status without extents"));
            }
            for (len, depth) in extents {
                let end = at.saturating_add(u64::from(len)).min(self.bytes);
                if depth == OWN {
                    add(&mut own, at, end, self.bytes);
                }
                at = end;
            }
        }
        timely(async {
            self.request(CMD_FLUSH, 0, 0).await?;
            self.reply().await
        })
        .await?;
        Ok(own)
    }

    /// Says goodbye.
    pub async fn end(mut self) {
        // Who is gone already needs no word.
        let _ = self.request(CMD_DISC, 0, 0).await;
    }
}

/// Adds the whole blocks within the bytes `from..to` of a disk of `bytes` bytes.
fn add(own: &mut Vec<Range<u64>>, from: u64, to: u64, bytes: u64) {
    let block = BLOCK_SIZE as u64;
    // A last block may be short.
    let end = if to == bytes { to.div_ceil(block) } else { to / block };
    let start = from.div_ceil(block);
    match own.last_mut() {
        Some(last) if last.end == start => last.end = last.end.max(end),
        _ if start < end => own.push(start..end),
        _ => {}
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_blocks_count_and_neighbours_are_one_run() {
        let mut own = Vec::new();
        add(&mut own, 0, 4096, 1 << 20);
        add(&mut own, 4096, 12_288, 1 << 20);
        add(&mut own, 20_480, 20_992, 1 << 20);
        add(&mut own, 40_448, 45_056, 1 << 20);
        assert_eq!(own, [0..3, 10..11]);
        add(&mut own, 1_044_480, 1_046_000, 1_046_000);
        assert_eq!(own.last(), Some(&(255..256)), "the short last block of a disk");
    }

    /// A server that says what it is told to say.
    async fn against(said: Vec<u8>) -> io::Error {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("nbd");
        let listener = tokio::net::UnixListener::bind(&path).unwrap();
        let server = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&said).await.unwrap();
            // Until the client has heard enough.
            let mut heard = Vec::new();
            let _ = stream.read_to_end(&mut heard).await;
        });
        let met = async {
            let mut watch = OverlayWatch::connect(&path, "top").await?;
            watch.settled().await
        };
        let e = met.await.unwrap_err();
        server.await.unwrap();
        e
    }

    fn greeting() -> BytesMut {
        let mut out = BytesMut::new();
        out.put_u64(NBDMAGIC);
        out.put_u64(IHAVEOPT);
        out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
        out
    }

    fn option(out: &mut BytesMut, option: u32, kind: u32, data: &[u8]) {
        out.put_u64(OPTION_REPLY);
        out.put_u32(option);
        out.put_u32(kind);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
    }

    /// All that leads to an export of 1 MiB.
    fn begun() -> BytesMut {
        let mut out = greeting();
        option(&mut out, OPT_STRUCTURED_REPLY, REP_ACK, &[]);
        let context = [&7u32.to_be_bytes()[..], CONTEXT].concat();
        option(&mut out, OPT_SET_META_CONTEXT, REP_META_CONTEXT, &context);
        option(&mut out, OPT_SET_META_CONTEXT, REP_ACK, &[]);
        let mut info = BytesMut::new();
        info.put_u16(INFO_EXPORT);
        info.put_u64(1 << 20);
        info.put_u16(1);
        option(&mut out, OPT_GO, REP_INFO, &info);
        option(&mut out, OPT_GO, REP_ACK, &[]);
        out
    }

    fn chunk(out: &mut BytesMut, kind: u16, cookie: u64, data: &[u8]) {
        out.put_u32(STRUCTURED_REPLY);
        out.put_u16(CHUNK_DONE);
        out.put_u16(kind);
        out.put_u64(cookie);
        out.put_u32(data.len() as u32);
        out.put_slice(data);
    }

    #[tokio::test]
    async fn a_server_that_breaks_the_protocol_is_left() {
        let words =
            |numbers: &[u32]| numbers.iter().flat_map(|n| n.to_be_bytes()).collect::<Vec<_>>();
        let after = |kind, cookie, data: &[u8]| {
            let mut out = begun();
            chunk(&mut out, kind, cookie, data);
            out
        };
        let mut old = greeting();
        old.truncate(16);
        old.put_u16(0);
        let mut unknown = greeting();
        option(&mut unknown, OPT_STRUCTURED_REPLY, (1 << 31) + 1, &[]);
        let mut no_context = greeting();
        option(&mut no_context, OPT_STRUCTURED_REPLY, REP_ACK, &[]);
        option(&mut no_context, OPT_SET_META_CONTEXT, REP_ACK, &[]);
        let mut long = greeting();
        long.put_u64(OPTION_REPLY);
        long.put_u32(OPT_STRUCTURED_REPLY);
        long.put_u32(REP_ACK);
        long.put_u32(u32::MAX);
        let mut endless = begun();
        endless.put_u32(STRUCTURED_REPLY);
        endless.put_u16(CHUNK_DONE);
        endless.put_u16(CHUNK_BLOCK_STATUS);
        endless.put_u64(1);
        endless.put_u32(u32::MAX);
        for (said, why) in [
            (BytesMut::zeroed(18), "greeting"),
            (old, "too old"),
            (unknown, "structured"),
            (no_context, "allocation depths"),
            (long, "reply to an option"),
            (endless, "too long"),
            (after(CHUNK_BLOCK_STATUS, 2, &words(&[7, 4096, 1])), "another request"),
            (after(CHUNK_BLOCK_STATUS, 1, &words(&[8, 4096, 1])), "another context"),
            (after(CHUNK_BLOCK_STATUS, 1, &words(&[7, 0, 1])), "no bytes"),
            (after(CHUNK_BLOCK_STATUS, 1, &words(&[7])), "without extents"),
            (after(CHUNK_IS_ERROR | 1, 1, &words(&[22, 0])), "error 22"),
            (after(99, 1, &[]), "unknown kind"),
        ] {
            let e = against(said.to_vec()).await;
            assert!(e.to_string().contains(why), "{why}: {e}");
        }
    }
}
