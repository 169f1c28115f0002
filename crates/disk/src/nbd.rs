//! A read-only NBD server on a unix socket, for QEMU's own NBD client.
//!
//! ```text
//! accept -> greeting -> options: GO | EXPORT_NAME --> requests: READ, FLUSH, CACHE -> DISC
//!                       LIST, INFO, ABORT, (others: unsupported)
//! ```
//!
//! Fixed newstyle, simple replies. Each read runs on its own, so that one which waits for the
//! network holds up no other; replies carry the client's cookie and may come in any order.

use std::future::Future;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::nbd_wire::*;

/// The longest read; QEMU's client asks for no more.
pub const MAX_READ: u32 = 32 << 20;
/// Bytes of reads that one connection may have in flight, in KiB.
const IN_FLIGHT_KIB: u32 = 64 << 10;
const MAX_OPTIONS: usize = 64;
const MAX_CONNECTIONS: usize = 16;

/// HAS_FLAGS, READ_ONLY, SEND_FLUSH, CAN_MULTI_CONN.
const EXPORT_FLAGS: u16 = 1 | 2 | 4 | 1 << 8;
const EPERM: u32 = 1;
const EIO: u32 = 5;
const EINVAL: u32 = 22;

/// Where the server's bytes come from.
pub trait BlockSource: Send + Sync + 'static {
    /// Bytes of the disk; constant.
    fn bytes(&self) -> u64;

    /// Fills `len` bytes from `offset`; both lie within the disk. It may wait as long as it
    /// must: other reads go on.
    fn read(&self, offset: u64, len: usize) -> impl Future<Output = io::Result<Vec<u8>>> + Send;
}

/// A listening server.
#[derive(Debug)]
pub struct NbdServer {
    listener: UnixListener,
    path: PathBuf,
    export: String,
}

impl NbdServer {
    /// Listens on `path` (a socket left there by a dead process is replaced) and offers the one
    /// export `export`. The socket can be used by its owner alone.
    ///
    /// # Errors
    /// If it can't listen there.
    pub fn bind(path: &Path, export: &str) -> io::Result<Self> {
        use std::os::unix::fs::{FileTypeExt, PermissionsExt};
        if std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket()) {
            std::fs::remove_file(path)?;
        }
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self { listener, path: path.to_path_buf(), export: export.to_owned() })
    }

    /// Offers `export` on a socket that somebody else has made at `path`.
    #[must_use]
    pub fn on(listener: UnixListener, path: &Path, export: &str) -> Self {
        Self { listener, path: path.to_path_buf(), export: export.to_owned() }
    }

    /// The socket.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until `stop`, then ends all connections and removes the socket.
    ///
    /// # Errors
    /// If the listening socket fails.
    pub async fn serve<S: BlockSource>(
        self,
        source: Arc<S>,
        stop: CancellationToken,
    ) -> io::Result<()> {
        let mut connections = JoinSet::new();
        let result = loop {
            tokio::select! {
                () = stop.cancelled() => break Ok(()),
                accepted = self.listener.accept() => match accepted {
                    Ok((stream, _)) if connections.len() < MAX_CONNECTIONS => {
                        connections.spawn(serve_one(stream, Arc::clone(&source), self.export.clone()));
                    }
                    Ok(_) => tracing::warn!("an NBD client too many was turned away"),
                    Err(e) => break Err(e),
                },
                Some(ended) = connections.join_next() => {
                    if let Ok(Err(e)) = ended
                        && e.kind() != io::ErrorKind::UnexpectedEof
                    {
                        tracing::debug!(error = %e, "an NBD connection ended");
                    }
                }
            }
        };
        connections.shutdown().await;
        let _ = std::fs::remove_file(&self.path);
        result
    }
}

fn broken(why: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, why)
}

/// Serves one connected client until it leaves.
///
/// # Errors
/// If the client breaks the protocol or the connection fails.
pub async fn serve_one<S: BlockSource>(
    stream: UnixStream,
    source: Arc<S>,
    export: String,
) -> io::Result<()> {
    let (reader, mut writer) = stream.into_split();
    let mut reader = BufReader::new(reader);
    if negotiate(&mut reader, &mut writer, source.bytes(), &export).await? {
        transmit(reader, writer, source).await?;
    }
    Ok(())
}

/// True when transmission begins, false when the client left.
async fn negotiate(
    reader: &mut BufReader<OwnedReadHalf>,
    writer: &mut OwnedWriteHalf,
    bytes: u64,
    export: &str,
) -> io::Result<bool> {
    let mut out = BytesMut::new();
    out.put_u64(NBDMAGIC);
    out.put_u64(IHAVEOPT);
    out.put_u16(FIXED_NEWSTYLE | NO_ZEROES);
    writer.write_all(&out).await?;
    let flags = reader.read_u32().await?;
    if flags & 1 == 0 || flags & !3 != 0 {
        return Err(broken("the NBD client's flags are not fixed newstyle"));
    }
    for _ in 0..MAX_OPTIONS {
        if reader.read_u64().await? != IHAVEOPT {
            return Err(broken("an NBD option lacks its magic"));
        }
        let (option, len) = (reader.read_u32().await?, reader.read_u32().await?);
        if len > MAX_OPTION {
            return Err(broken("an NBD option is too long"));
        }
        let mut data = vec![0; len as usize];
        reader.read_exact(&mut data).await?;
        let mut out = BytesMut::new();
        let mut reply = |kind: u32, data: &[u8]| {
            out.put_u64(OPTION_REPLY);
            out.put_u32(option);
            out.put_u32(kind);
            out.put_u32(data.len() as u32);
            out.put_slice(data);
        };
        let mut begins = false;
        match option {
            // It has no way to refuse but to hang up.
            OPT_EXPORT_NAME => {
                if !names(&data, export) {
                    return Err(broken("the NBD client asked for an unknown export"));
                }
                out.put_u64(bytes);
                out.put_u16(EXPORT_FLAGS);
                if flags & u32::from(NO_ZEROES) == 0 {
                    out.put_bytes(0, 124);
                }
                begins = true;
            }
            OPT_ABORT => {
                reply(REP_ACK, &[]);
                // The client may be gone already.
                let _ = writer.write_all(&out).await;
                return Ok(false);
            }
            OPT_LIST if data.is_empty() => {
                let mut one = BytesMut::new();
                one.put_u32(export.len() as u32);
                one.put_slice(export.as_bytes());
                reply(REP_SERVER, &one);
                reply(REP_ACK, &[]);
            }
            OPT_INFO | OPT_GO => match asked_export(&data) {
                None => reply(REP_INVALID, &[]),
                Some(name) if !names(name, export) => reply(REP_UNKNOWN, &[]),
                Some(_) => {
                    let mut info = BytesMut::new();
                    info.put_u16(INFO_EXPORT);
                    info.put_u64(bytes);
                    info.put_u16(EXPORT_FLAGS);
                    reply(REP_INFO, &info);
                    let mut sizes = BytesMut::new();
                    sizes.put_u16(INFO_BLOCK_SIZE);
                    sizes.put_u32(1);
                    sizes.put_u32(4096);
                    sizes.put_u32(MAX_READ);
                    reply(REP_INFO, &sizes);
                    reply(REP_ACK, &[]);
                    begins = option == OPT_GO;
                }
            },
            OPT_LIST => reply(REP_INVALID, &[]),
            _ => reply(REP_UNSUPPORTED, &[]),
        }
        writer.write_all(&out).await?;
        if begins {
            return Ok(true);
        }
    }
    let mut out = BytesMut::new();
    out.put_u64(OPTION_REPLY);
    out.put_u32(0);
    out.put_u32(REP_TOO_BIG);
    out.put_u32(0);
    writer.write_all(&out).await?;
    Err(broken("the NBD client sends options without end"))
}

fn names(asked: &[u8], export: &str) -> bool {
    asked.is_empty() || asked == export.as_bytes()
}

/// The export name in the data of an INFO or GO option, if the data is well-formed.
fn asked_export(data: &[u8]) -> Option<&[u8]> {
    let (len, rest) = data.split_first_chunk()?;
    let (name, rest) = rest.split_at_checked(u32::from_be_bytes(*len) as usize)?;
    let (count, rest) = rest.split_first_chunk()?;
    (rest.len() == usize::from(u16::from_be_bytes(*count)) * 2).then_some(name)
}

fn reply_to(cookie: u64, error: u32, data: &[u8]) -> BytesMut {
    let mut out = BytesMut::with_capacity(16 + data.len());
    out.put_u32(SIMPLE_REPLY);
    out.put_u32(error);
    out.put_u64(cookie);
    out.put_slice(data);
    out
}

async fn transmit<S: BlockSource>(
    mut reader: BufReader<OwnedReadHalf>,
    writer: OwnedWriteHalf,
    source: Arc<S>,
) -> io::Result<()> {
    let writer = Arc::new(Mutex::new(writer));
    let room = Arc::new(Semaphore::new(IN_FLIGHT_KIB as usize));
    // Dropping the set ends the reads of a client that left.
    let mut reads = JoinSet::new();
    loop {
        while let Some(ended) = reads.try_join_next() {
            ended.map_err(io::Error::other)??;
        }
        if reader.read_u32().await? != REQUEST {
            return Err(broken("an NBD request lacks its magic"));
        }
        let _flags = reader.read_u16().await?;
        let kind = reader.read_u16().await?;
        let cookie = reader.read_u64().await?;
        let (offset, len) = (reader.read_u64().await?, reader.read_u32().await?);
        let inside = offset.checked_add(u64::from(len)).is_some_and(|e| e <= source.bytes());
        let error = match kind {
            CMD_READ if inside && (1..=MAX_READ).contains(&len) => {
                let kib = len.div_ceil(1024);
                let Ok(permit) = Arc::clone(&room).acquire_many_owned(kib).await else {
                    return Err(broken("the NBD server is closing"));
                };
                let (source, writer) = (Arc::clone(&source), Arc::clone(&writer));
                reads.spawn(async move {
                    let out = match source.read(offset, len as usize).await {
                        Ok(data) if data.len() == len as usize => reply_to(cookie, 0, &data),
                        Ok(_) => reply_to(cookie, EIO, &[]),
                        Err(e) => {
                            tracing::error!(error = %e, offset, len, "a disk read failed");
                            reply_to(cookie, EIO, &[])
                        }
                    };
                    let done = writer.lock().await.write_all(&out).await;
                    drop(permit);
                    done
                });
                continue;
            }
            CMD_DISC => {
                while reads.join_next().await.is_some() {}
                return Ok(());
            }
            // A write's data must be skipped to stay in step.
            CMD_WRITE => {
                if len > MAX_READ {
                    return Err(broken("an NBD write is too long"));
                }
                let mut skip = (&mut reader).take(u64::from(len));
                tokio::io::copy(&mut skip, &mut tokio::io::sink()).await?;
                EPERM
            }
            // CACHE is a hint.
            CMD_FLUSH | CMD_CACHE => 0,
            CMD_TRIM | CMD_WRITE_ZEROES => EPERM,
            _ => EINVAL,
        };
        writer.lock().await.write_all(&reply_to(cookie, error, &[])).await?;
    }
}
