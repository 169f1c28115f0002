//! Keeps the source QEMU's connection open beside its relay while the machine is handed over.
//!
//! A QEMU whose connection is closed between its STOP and the end of its device state comes back by
//! no command, and the machine's memory is lost with it. So for that time the driver holds the
//! relay's end of the connection, too: when the relay dies QEMU notices nothing, and the driver
//! reads on in its place until QEMU answers again. Only when the destination is known to be dead
//! is the stream taken to its end and the machine let run.

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
const SETTLE_WITHIN: Duration = Duration::from_secs(20);
/// How often it is asked how its migration is while it has not switched yet.
const ASK_EVERY: Duration = Duration::from_millis(20);

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

    /// The relay is gone: reads on until QEMU answers and is beyond its switch.
    pub(super) async fn settle(&mut self, machine: &Machine) {
        let beyond = async {
            loop {
                match machine.query_migrate().await {
                    Ok(i)
                        if matches!(i.status, MigrationStatus::Active | MigrationStatus::Setup) =>
                    {
                        tokio::time::sleep(ASK_EVERY).await;
                    }
                    // One that has ended has no more to say.
                    Ok(_) | Err(_) => return,
                }
            }
        };
        let read = async {
            let mut buf = BytesMut::new();
            while self.stream.read_buf(&mut buf).await.is_ok_and(|n| n > 0) {
                buf.clear();
            }
            std::future::pending::<()>().await;
        };
        let both = async {
            tokio::select! { () = beyond => {}, () = read => {} }
        };
        if tokio::time::timeout(SETTLE_WITHIN, both).await.is_err() {
            tracing::warn!("QEMU does not answer although its stream is read");
        }
    }

    /// The destination is dead: takes QEMU's stream to its end in place of the relay. The machine can
    /// run on afterwards.
    pub(super) async fn finish(mut self, machine: &Machine) -> Result<(), MoveError> {
        const DOING: &str = "bringing the machine back without its relay";
        let mut shut = Vec::new();
        ReturnMessage::Shut(0).encode(&mut shut);
        // One that was told so before reads no more.
        let _ = self.stream.write_all(&shut).await;
        let wanted = [MigrationStatus::Completed, MigrationStatus::Failed];
        let ended = machine.wait_migration(DOING, &wanted, EVENT_WITHIN);
        let mut buf = BytesMut::new();
        let drained = async {
            while self.stream.read_buf(&mut buf).await.is_ok_and(|n| n > 0) {
                buf.clear();
            }
            std::future::pending::<()>().await;
        };
        tokio::select! {
            ended = ended => ended.map(drop).map_err(qemu(DOING)),
            () = drained => Ok(()),
        }
    }
}
