//! Keeps the source QEMU's connection open beside its relay while the machine is handed over.
//!
//! A QEMU whose connection is closed between its STOP and the end of its device state comes back by
//! no command, and the machine's memory is lost with it. So for that time the driver holds the
//! relay's end of the connection, too: when the relay dies QEMU notices nothing, and the driver
//! reads on in its place until QEMU answers again. Only when the destination is known to be dead
//! is the stream taken to its end and the machine let run. Behind the switch it is held, too: a
//! QEMU that has sent everything and loses its connection would let its machine run a second time.

use std::os::fd::OwnedFd;
use std::time::Duration;

use bytes::BytesMut;
use godwit_qemu::stream::ReturnMessage;
use godwit_qemu::{Machine, MigrationStatus};
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

use super::MoveError;
use super::run::{EVENT_WITHIN, qemu};
use crate::relay::RelayStatus;

/// How long QEMU may take until it answers while its stream is read.
const SETTLE_WITHIN: Duration = Duration::from_secs(5);
/// How often it is asked how its migration is while it has not switched yet.
const ASK_EVERY: Duration = Duration::from_millis(5);
/// A QEMU that has not answered for so long is taken to be writing with its main lock held.
const SILENT_FOR: Duration = Duration::from_millis(20);
/// How long QEMU may take to say how much it has left to send.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How much is read of its stream at once, in bytes.
const STEP: usize = 64 << 10;
/// With so little left to send, in bytes, QEMU may be at its end before its connection is cut: more
/// than the connection itself holds.
const NEAR_END: u64 = 4 << 20;

/// Whether QEMU has not stopped its machine for the switch yet.
pub(super) const fn is_before_switch(status: MigrationStatus) -> bool {
    matches!(status, MigrationStatus::Active | MigrationStatus::Setup)
}

/// A second handle to the connection between QEMU and its relay.
#[derive(Debug)]
pub(super) struct Keeper {
    stream: UnixStream,
}

impl Keeper {
    /// Takes it from the relay's process; `None` where that is not allowed, and then a relay that
    /// dies in the switch takes the machine's memory with it.
    pub(super) fn take(status: &RelayStatus, machine: &Machine) -> Option<Self> {
        let relay = Pid::from_raw(status.pid?)?;
        let process = pidfd_open(relay, PidfdFlags::empty()).ok()?;
        let flags = PidfdGetfdFlags::empty();
        let taken = pidfd_getfd(&process, status.qemu_socket?, flags);
        let fd: OwnedFd = taken
            .inspect_err(|error| tracing::warn!(%error, "the relay's connection can't be shared"))
            .ok()?;
        // A number is no proof: what was taken must lead to this QEMU.
        let peer = rustix::net::sockopt::socket_peercred(&fd).ok()?;
        if peer.pid.as_raw_nonzero().get() != machine.process().pid {
            return None;
        }
        let stream = UnixStream::from_std(fd.into()).ok()?;
        Some(Self { stream })
    }

    /// The relay is gone: reads on until QEMU answers and, when it was let `switch`, is beyond that,
    /// and nothing more: what is read here never comes to a destination that runs.
    pub(super) async fn settle(&mut self, machine: &Machine, switch: bool) {
        let mut buf = BytesMut::new();
        let settled = async {
            loop {
                let asked = machine.query_migrate();
                tokio::pin!(asked);
                let answer = loop {
                    match tokio::time::timeout(SILENT_FOR, &mut asked).await {
                        Ok(answer) => break answer,
                        Err(_) => self.read_some(&mut buf).await,
                    }
                };
                match answer {
                    Ok(i) if switch && is_before_switch(i.status) => {
                        self.read_some(&mut buf).await;
                    }
                    // One that has ended has no more to say.
                    Ok(_) | Err(_) => return,
                }
            }
        };
        if tokio::time::timeout(SETTLE_WITHIN, settled).await.is_err() {
            tracing::warn!("QEMU does not answer although its stream is read");
        }
    }

    /// Takes what QEMU has written, up to [`STEP`] bytes; waits a little for it.
    async fn read_some(&mut self, buf: &mut BytesMut) {
        buf.clear();
        buf.reserve(STEP);
        let read = tokio::time::timeout(ASK_EVERY, self.stream.read_buf(buf)).await;
        if !matches!(read, Ok(Ok(n)) if n > 0) {
            // Nothing, or its end: what follows is for QEMU to say.
            tokio::time::sleep(ASK_EVERY).await;
        }
    }

    /// The destination is dead: takes QEMU's stream to its end in place of the relay. The machine can
    /// run on afterwards.
    pub(super) async fn finish(self, machine: &Machine) -> Result<(), MoveError> {
        const DOING: &str = "bringing the machine back without its relay";
        self.end(machine, &[MigrationStatus::Completed, MigrationStatus::Failed], DOING).await
    }

    /// The machine runs at its destination and the relay is lost: QEMU keeps what the destination
    /// may lack, and does not run. While it has much to send it pauses when its connection is cut,
    /// and can go on over another. One that has sent everything takes a cut for a failure and lets
    /// its machine run; so it is told that all is well, and what was lost on the way is read from
    /// its memory ([`super::rest`]).
    pub(super) async fn leave(self, machine: &Machine) -> Result<(), MoveError> {
        const DOING: &str = "keeping the memory of a machine that has left";
        match tokio::time::timeout(ANSWER_WITHIN, machine.query_migrate()).await {
            Ok(Ok(i)) if i.status == MigrationStatus::PostcopyActive && i.remaining <= NEAR_END => {
            }
            // It holds its main lock: it writes the very last bytes.
            Err(_) => {}
            Ok(_) => {
                // The relay may have it open, too.
                if let Err(e) = rustix::net::shutdown(&self.stream, rustix::net::Shutdown::Both) {
                    tracing::debug!(error = %e, "QEMU's connection was closed before");
                }
                return Ok(());
            }
        }
        // It pauses if it had more to say on the channel that only the relay held.
        let wanted = [MigrationStatus::Completed, MigrationStatus::PostcopyPaused];
        self.end(machine, &wanted, DOING).await
    }

    /// Tells QEMU that the destination has everything, and reads until it has ended.
    async fn end(
        mut self,
        machine: &Machine,
        wanted: &[MigrationStatus],
        doing: &'static str,
    ) -> Result<(), MoveError> {
        let mut shut = Vec::new();
        ReturnMessage::Shut(0).encode(&mut shut);
        // One that was told so before reads no more.
        let _ = self.stream.write_all(&shut).await;
        let ended = machine.wait_migration(doing, wanted, EVENT_WITHIN);
        let mut buf = BytesMut::new();
        let drained = async {
            while self.stream.read_buf(&mut buf).await.is_ok_and(|n| n > 0) {
                buf.clear();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = ended => ended.map(drop).map_err(qemu(doing)),
            () = drained => Ok(()),
        }
    }
}
