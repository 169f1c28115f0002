//! What goes on after a break: the same migration over new relays, or the machine back at its
//! source.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use godwit_qemu::stream::{Command, Limits, Record, ReturnMessage, StreamError, StreamParser};
use godwit_qemu::{BlockInUse, Machine, MigrationStatus, QemuError};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{UnixListener, UnixStream};

use super::rest::Rest;
use super::run::{EVENT_WITHIN, Source, lost, qemu, relay};
use super::{Asking, DestinationFate, MoveError, Sent, SourceDriver, Steering};
use crate::relay::{AbortOnDrop, RelayClient, RelayError, RelayPhase};

/// How long a QEMU may take to notice that its connection is gone.
const BREAK_WITHIN: Duration = Duration::from_secs(30);
/// How long QEMU may take to end a migration whose every page it is told to have been received.
pub(super) const RECLAIM_WITHIN: Duration = Duration::from_secs(60);

/// Waits until post-copy is paused. A QEMU whose main loop waits for a page may tell nothing; then
/// it is taken at its word that comes with the command itself.
async fn paused(machine: &Machine, doing: &'static str) -> Result<(), MoveError> {
    let wanted = [MigrationStatus::PostcopyPaused];
    match machine.wait_migration("waiting for the break", &wanted, BREAK_WITHIN).await {
        Ok(_) | Err(QemuError::TimedOut { .. }) => Ok(()),
        Err(e) => Err(qemu(doing)(e)),
    }
}

/// Waits until a source's post-copy is paused or has come to its end.
async fn halted(machine: &Machine, doing: &'static str) -> Result<MigrationStatus, MoveError> {
    let wanted = [MigrationStatus::PostcopyPaused, MigrationStatus::Completed];
    match machine.wait_migration("waiting for the break", &wanted, BREAK_WITHIN).await {
        Ok(info) => Ok(info.status),
        Err(QemuError::TimedOut { .. }) => Ok(MigrationStatus::PostcopyPaused),
        Err(e) => Err(qemu(doing)(e)),
    }
}

/// After a break: lets the destination's QEMU listen on `socket` for a new relay.
///
/// # Errors
/// [`MoveError::Qemu`].
pub async fn recover_incoming(machine: &Machine, socket: &Path) -> Result<(), MoveError> {
    const DOING: &str = "recovering the destination's QEMU";
    paused(machine, DOING).await?;
    machine.migrate_recover(socket).await.map_err(qemu(DOING))
}

/// After a break: lets the source's QEMU go on through a new relay, whose socket for it is
/// `socket`, and drives the migration to its end.
///
/// # Errors
/// As [`super::send`].
pub async fn recover_outgoing(
    machine: &Machine,
    client: &RelayClient,
    socket: &Path,
    sent: &mut Sent,
    steering: &Steering,
) -> Result<(), MoveError> {
    const DOING: &str = "recovering the source's QEMU";
    let whole = halted(machine, DOING).await? == MigrationStatus::Completed;
    let joined = client
        .wait(|s| s.phase >= RelayPhase::Committed)
        .await
        .map_err(relay("waiting for the new relays"))?;
    if let Some(why) = lost(&joined) {
        return Err(MoveError::Interrupted { why });
    }
    let _rest = if whole {
        // It has sent everything, and some of that was lost with its relay.
        let rest = Rest::of(machine, sent.ram.as_ref()).await?;
        let to = socket.to_owned();
        Some(AbortOnDrop(tokio::spawn(rest.send(to)).abort_handle()))
    } else {
        machine.migrate_resume(socket).await.map_err(qemu(DOING))?;
        None
    };
    let mut source = found(machine, client, socket, SourceDriver::resumed(), sent);
    let unknown = || -> Asking { Box::pin(async { DestinationFate::Unknown }) };
    source.drive(steering, unknown).await
}

/// After a break: waits until a new relay has sent the rest of the disk; the memory is there, or
/// lost.
///
/// # Errors
/// [`MoveError::Interrupted`].
pub async fn recover_disk(client: &RelayClient, sent: &mut Sent) -> Result<(), MoveError> {
    let before = sent.counts;
    let last =
        client.wait(|s| s.end.is_some()).await.map_err(relay("hearing from the new relay"))?;
    sent.counts = before.plus(&last.counts);
    if let Some(why) = lost(&last) {
        return Err(MoveError::Interrupted { why });
    }
    sent.released = Some(super::measure::now());
    Ok(())
}

/// Drives a migration on whose relay was found again in the switch or after it.
///
/// # Errors
/// As [`super::send`].
pub async fn follow_outgoing(
    machine: &Machine,
    client: &RelayClient,
    socket: &Path,
    sent: &mut Sent,
    steering: &Steering,
    ask: impl Fn() -> Asking,
) -> Result<(), MoveError> {
    let beyond = client.status().committed;
    let driver = if beyond { SourceDriver::resumed() } else { SourceDriver::frozen() };
    let mut source = found(machine, client, socket, driver, sent);
    source.drive(steering, ask).await
}

fn found<'a>(
    machine: &'a Machine,
    client: &'a RelayClient,
    socket: &'a Path,
    driver: SourceDriver,
    sent: &'a mut Sent,
) -> Source<'a> {
    let (before, events) = (sent.counts, machine.events());
    Source {
        machine,
        client,
        socket,
        driver,
        sent,
        before,
        events,
        late: true,
        rings: Vec::new(),
        keeper: None,
        kept: None,
        // Or nobody would have to follow it.
        proceeded: true,
    }
}

/// Brings a machine back whose relay was lost in the switch, when its destination is known never
/// to have run it: QEMU is told that every page was received, ends its migration, and can run on
/// with all it had at STOP. `socket` is where QEMU is met; nobody else may listen there.
///
/// # Errors
/// [`MoveError::Stuck`] when QEMU itself cannot come back; [`MoveError::Qemu`],
/// [`MoveError::Relay`], after which it may be tried again.
pub async fn reclaim(machine: &Machine, socket: &Path) -> Result<(), MoveError> {
    const DOING: &str = "bringing the machine back";
    if let Some(why) = super::run::end_of(machine).await {
        return Err(MoveError::Ended { why });
    }
    let wanted =
        [MigrationStatus::PostcopyPaused, MigrationStatus::Failed, MigrationStatus::Completed];
    let info = match machine.wait_migration(DOING, &wanted, BREAK_WITHIN).await {
        Ok(info) => info,
        Err(QemuError::TimedOut { .. }) => {
            let now = machine.query_migrate().await.map_err(qemu(DOING))?;
            // QEMU 10.0 ends its migration there without a word, and runs on by no command.
            let stuck = matches!(now.status, MigrationStatus::Device | MigrationStatus::Cancelling);
            return Err(if stuck {
                MoveError::Stuck
            } else {
                qemu(DOING)(QemuError::TimedOut { doing: DOING, within: BREAK_WITHIN })
            });
        }
        Err(e) => return Err(qemu(DOING)(e)),
    };
    if matches!(info.status, MigrationStatus::Failed | MigrationStatus::Completed) {
        // It gave up before it had sent the machine off, or was told that it has, and has all of it.
        return Ok(());
    }
    let blocks = machine.ram_blocks().await.map_err(qemu(DOING))?;
    let listener = crate::relay::listen(socket, "listening for QEMU on").map_err(relay(DOING))?;
    machine.migrate_resume(socket).await.map_err(qemu(DOING))?;
    let answered = answer(&listener, Receiver::new(blocks));
    let answered = tokio::time::timeout(RECLAIM_WITHIN, answered).await;
    let _ = std::fs::remove_file(socket);
    match answered {
        Ok(done) => done.map_err(relay(DOING))?,
        Err(_) => {
            let e = RelayError::QemuClosed("the source QEMU did not end its stream in time, and");
            return Err(relay(DOING)(e));
        }
    }
    machine
        .wait_migration(DOING, &[MigrationStatus::Completed], EVENT_WITHIN)
        .await
        .map_err(qemu(DOING))?;
    Ok(())
}

async fn read_from(stream: &mut Option<UnixStream>, buf: &mut BytesMut) -> std::io::Result<usize> {
    match stream {
        Some(s) => s.read_buf(buf).await,
        None => std::future::pending().await,
    }
}

async fn answer(listener: &UnixListener, mut receiver: Receiver) -> Result<(), RelayError> {
    let fail = |source| RelayError::Qemu { what: "answering QEMU for its destination", source };
    let (mut main, mut preempt) = (None::<UnixStream>, None::<UnixStream>);
    let (mut buf, mut drained) = (BytesMut::new(), BytesMut::new());
    loop {
        buf.reserve(64 << 10);
        tokio::select! {
            biased;
            accepted = listener.accept(), if preempt.is_none() => {
                let (stream, _) = accepted.map_err(fail)?;
                // QEMU opens its main channel first.
                if main.is_none() { main = Some(stream) } else { preempt = Some(stream) }
            }
            read = read_from(&mut main, &mut buf) => {
                if read.map_err(fail)? == 0 {
                    return if receiver.ended {
                        Ok(())
                    } else {
                        Err(RelayError::QemuClosed("the source QEMU"))
                    };
                }
                let words = receiver.take(&buf.split())?;
                if let Some(main) = &mut main {
                    main.write_all(&words).await.map_err(fail)?;
                }
            }
            read = read_from(&mut preempt, &mut drained) => {
                if read.unwrap_or(0) == 0 {
                    preempt = None;
                }
                drained.clear();
            }
        }
    }
}

/// Answers a recovering QEMU as a destination would that has every page.
#[derive(Debug)]
struct Receiver {
    main: StreamParser,
    /// Bytes in use of each RAM block.
    blocks: HashMap<Bytes, u64>,
    ended: bool,
}

impl Receiver {
    fn new(blocks: Vec<BlockInUse>) -> Self {
        let blocks = blocks.into_iter().map(|b| (Bytes::from(b.name), b.used_bytes)).collect();
        Self { main: StreamParser::resumed(Limits::default()), blocks, ended: false }
    }

    /// Takes bytes of QEMU's main channel; gives those of the return path.
    fn take(&mut self, bytes: &[u8]) -> Result<Vec<u8>, StreamError> {
        /// QEMU's own value for a resume that may go on.
        const RESUME: u32 = 1;
        let mut words = Vec::new();
        self.main.push(bytes);
        while let Some(record) = self.main.next()? {
            match record {
                Record::Command(Command::RecvBitmap { block }) => {
                    let pages = self.blocks.get(&block).copied().unwrap_or(0) / 4096;
                    let len = usize::try_from(pages.div_ceil(64) * 8).unwrap_or(0);
                    let bitmap = Bytes::from(vec![0xff; len]);
                    ReturnMessage::RecvBitmap { block, bitmap }.encode(&mut words);
                }
                Record::Command(Command::PostcopyResume) => {
                    ReturnMessage::ResumeAck(RESUME).encode(&mut words);
                }
                Record::Eof => {
                    self.ended = true;
                    ReturnMessage::Shut(0).encode(&mut words);
                }
                _ => {}
            }
        }
        Ok(words)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_recovering_source_is_notified_that_every_page_is_there() {
        let m0 = BlockInUse { name: "m0".into(), used_bytes: 65 * 4096, host_address: 0 };
        let mut r = Receiver::new(vec![m0]);
        let mut stream = Vec::new();
        let block = Bytes::from_static(b"m0");
        Record::Command(Command::RecvBitmap { block: block.clone() }).encode(&mut stream);
        Record::Command(Command::PostcopyResume).encode(&mut stream);
        Record::Eof.encode(&mut stream);
        let said = r.take(&stream).unwrap();
        let mut due = Vec::new();
        let bitmap = Bytes::from(vec![0xff; 16]);
        ReturnMessage::RecvBitmap { block, bitmap }.encode(&mut due);
        ReturnMessage::ResumeAck(1).encode(&mut due);
        ReturnMessage::Shut(0).encode(&mut due);
        assert_eq!(said, due);
        assert!(r.ended);
    }
}
