//! The relays of a migration: one process at each end, between QEMU's unix socket and the link.
//!
//! ```text
//!  source QEMU                source relay              destination relay         destination QEMU
//!  main channel ---unix---> parse, pack, pace ==bulk lane==> unpack ---unix---> main channel
//!  preempt      ---unix---> parse, pack       ==demand lane=> unpack ---unix---> preempt
//!  main channel <--unix---- parse             <=demand lane== parse  <--unix---- return path
//!                           acknowledged      <=steering====  taken by QEMU
//! ```
//!
//! A relay is a process of its own, so that a daemon's end does not end a migration. QEMU is read
//! no faster than the link carries; what is under way is bounded by a window, and before the
//! machine stops everything under way is let through (`drain`), so that its device state waits
//! for nothing. Of an activated machine only its own pages are read, beside QEMU (`own`); the
//! destination's relay fills in what its site holds (`fill`), and names what was there before (`visit`).

mod around;
mod both;
mod commit;
mod config;
mod control;
mod core;
mod destination;
mod disk;
mod due;
mod error;
mod fill;
mod frame;
mod given;
mod handover;
mod known;
mod meet;
mod missing;
mod own;
mod pacer;
mod pages;
mod passing;
mod preempt;
mod round;
mod source;
mod status;
mod visit;
mod waits;
mod wire;

#[doc(hidden)]
pub use both::BothRelays;
pub use commit::{NOT_COMMITTED, says_all_memory, says_committed, write_all_memory};
pub use config::{HeldMemory, Meeting, OwnMemory, RelayConfig, RelayDisk, RelayRole};
pub use control::{RelayClient, RelayCommand};
pub use error::RelayError;
pub use given::Given;
pub use status::{Counts, RamSection, RelayEnd, RelayPhase, RelayStatus};
pub use visit::{Visit, marks_bytes};

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_disk::{NbdServer, RemoteDisk};
use godwit_transfer::{Endpoint, EndpointOptions, Identity, Revocations, Trust};
use tokio::net::UnixListener;
use tokio::sync::{mpsc, watch};
use tokio_util::sync::CancellationToken;

use commit::CommitFile;
use known::ReferError;

/// How long a relay that has ended waits for its daemon to read the final status.
const LINGER: Duration = Duration::from_secs(600);
/// How often the list of revoked certificates is read again.
const READ_REVOKED_EVERY: Duration = Duration::from_secs(2);

/// Runs one relay from its start to [`RelayCommand::Finish`] (or ten minutes after its end).
/// The final status tells how the migration ended; it is also returned.
///
/// # Errors
/// [`RelayError`] when the relay could not even begin.
pub async fn run_relay(config: RelayConfig) -> Result<RelayStatus, RelayError> {
    config.check()?;
    let (identity, control, given) = match &config.given {
        Some(given) => {
            let taken = given.take()?;
            let inputs = Inputs {
                qemu: taken.qemu,
                nbd: taken.nbd,
                layers: Some(taken.layers),
                commit: CommitFile::new(taken.commit),
                held: taken.held,
                visit: taken.visit,
                arrived: taken.arrived,
                memory: taken.memory,
                pagemap: taken.pagemap,
                sealed: taken.sealed,
                listens: taken.listens,
            };
            (taken.identity, Some(taken.control), inputs)
        }
        None => (Identity::load(&config.keys).map_err(RelayError::Keys)?, None, Inputs::default()),
    };
    let held = config.held_memory(given.held)?;
    let trust =
        Trust::new(identity.authority(), config.revoked.clone()).map_err(RelayError::Keys)?;
    let address = match config.meeting {
        Meeting::Listen(address) => address,
        Meeting::Dial(there) if there.is_ipv6() => (std::net::Ipv6Addr::UNSPECIFIED, 0).into(),
        Meeting::Dial(_) => (std::net::Ipv4Addr::UNSPECIFIED, 0).into(),
    };
    let options = EndpointOptions::patient(Duration::from_millis(config.link_patience_ms));
    let endpoint = Endpoint::bind(address, identity, trust.clone(), options)
        .map_err(|source| RelayError::Link { peer: config.peer.to_string(), source })?;
    let _revocations = config.revoked_file.clone().map(|file| follow_revocations(trust, file));

    let control = match control {
        Some(control) => control,
        None => listen(&config.control, "listening for the daemon on")?,
    };
    let (status_tx, status) = watch::channel(RelayStatus::new(config.migration));
    if config.resume {
        status_tx.send_modify(|s| s.committed = true);
    }
    let (command_tx, mut commands) = mpsc::channel(16);
    let server = tokio::spawn(control::serve(control, status.clone(), command_tx));

    // QEMU has the disk as a node from its start, so it is served before anything else, and until
    // the driver has pivoted away from it.
    let served = BlockDevice::serve(&config, given.nbd, &status_tx)?;
    let worked = match config.role {
        RelayRole::Source => {
            let guest = given.memory.zip(given.pagemap).zip(given.sealed);
            let guest = guest.map(|((memory, pagemap), sealed)| (memory, pagemap, sealed));
            let visit = config.visit.clone().zip(given.visit);
            let known = source::Known { held, visit, guest };
            let opened = (given.qemu, given.layers, known);
            source::run(&config, opened, &endpoint, &status_tx, &mut commands).await
        }
        RelayRole::Destination => {
            let visit = config.visit.clone().zip(given.visit);
            let visit = visit.map(|(visit, memory)| (visit, memory, given.sealed));
            let (arrived, memory) = (given.arrived, given.memory);
            let known = destination::Known { held, visit, arrived, memory };
            let opened = (served.as_ref(), &given.commit, known, given.listens);
            destination::run(&config, &endpoint, opened, &status_tx, &mut commands).await
        }
    };
    if matches!(worked, Err(RelayError::Refer(ReferError::Differs { .. }))) {
        status_tx.send_modify(|s| s.doubt = true);
    }
    let end = match worked {
        Ok(Outcome::Moved) => RelayEnd::Done,
        Ok(Outcome::Reclaimed) => RelayEnd::Reclaimed,
        Err(e @ (RelayError::Aborted(_) | RelayError::PeerAborted(_))) => {
            RelayEnd::Aborted { why: e.in_full() }
        }
        Err(e) => RelayEnd::Broken { why: e.in_full() },
    };
    tracing::info!(migration = %config.migration, ?end, "a relay has ended");
    status_tx.send_modify(|s| s.end = Some(end));
    endpoint.close("the relay has ended").await;

    // The daemon may be away just now; it reads the status when it is back.
    let _ = tokio::time::timeout(LINGER, async {
        while let Some((command, answer)) = commands.recv().await {
            let finish = command == RelayCommand::Finish;
            let _ = answer.send(finish);
            if finish {
                // The answer must leave before the process does.
                tokio::task::yield_now().await;
                return;
            }
        }
    })
    .await;
    server.abort();
    if let Some(served) = served {
        served.end().await;
    }
    let _ = std::fs::remove_file(&config.control);
    let last = status.borrow().clone();
    Ok(last)
}

/// What is open already for a relay's work.
#[derive(Debug, Default)]
struct Inputs {
    qemu: Option<UnixListener>,
    nbd: Option<UnixListener>,
    layers: Option<Vec<std::fs::File>>,
    commit: CommitFile,
    held: Option<std::fs::File>,
    visit: Option<std::fs::File>,
    arrived: Option<std::fs::File>,
    memory: Option<std::fs::File>,
    pagemap: Option<std::fs::File>,
    sealed: Option<std::fs::File>,
    listens: Option<tokio::net::unix::pipe::Receiver>,
}

/// Takes newer lists of revoked certificates over while the relay works: the link to a peer that
/// one of them names is closed. A list counts only with the authority's signature.
fn follow_revocations(trust: Trust, file: std::path::PathBuf) -> AbortOnDrop {
    AbortOnDrop(
        tokio::spawn(async move {
            loop {
                tokio::time::sleep(READ_REVOKED_EVERY).await;
                let taken = Revocations::load(&file)
                    .and_then(|list| if list.number == 0 { Ok(false) } else { trust.revoke(list) });
                match taken {
                    Ok(true) => tracing::info!("a newer list of revoked certificates"),
                    Ok(false) => {}
                    Err(error) => tracing::warn!(%error, "a list of revoked certificates"),
                }
            }
        })
        .abort_handle(),
    )
}

/// Ends a task with its owner.
pub(crate) struct AbortOnDrop(pub(crate) tokio::task::AbortHandle);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// The destination's block device.
struct BlockDevice {
    there: watch::Sender<Option<Arc<RemoteDisk>>>,
    stop: CancellationToken,
    task: tokio::task::JoinHandle<()>,
}

impl BlockDevice {
    fn serve(
        config: &RelayConfig,
        given: Option<UnixListener>,
        status: &watch::Sender<RelayStatus>,
    ) -> Result<Option<Self>, RelayError> {
        let Some(RelayDisk::Destination { base, bytes, nbd, .. }) = &config.disk else {
            return Ok(None);
        };
        let fail =
            |source| RelayError::Socket { what: "offering the disk on", path: nbd.clone(), source };
        let server = match given {
            Some(listener) => NbdServer::on(listener, nbd, ""),
            None => NbdServer::bind(nbd, "").map_err(fail)?,
        };
        let (late, there) = disk::LateDisk::new(base, *bytes, status.subscribe())?;
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move {
            if let Err(e) = server.serve(Arc::new(late), token).await {
                tracing::warn!(error = %e, "the block device of a migration has ended");
            }
        });
        Ok(Some(Self { there, stop, task }))
    }

    async fn end(self) {
        self.stop.cancel();
        let _ = tokio::time::timeout(Duration::from_secs(2), self.task).await;
    }
}

/// How a relay's work came to a good end.
enum Outcome {
    Moved,
    Reclaimed,
}

/// Does `work` unless the daemon aborts first; other commands are refused meanwhile.
async fn unless_aborted<T>(
    commands: &mut mpsc::Receiver<control::Asked>,
    work: impl Future<Output = Result<T, RelayError>>,
) -> Result<T, RelayError> {
    tokio::pin!(work);
    loop {
        tokio::select! {
            done = &mut work => return done,
            Some((command, answer)) = commands.recv() => match command {
                RelayCommand::Abort { why } => {
                    let _ = answer.send(true);
                    return Err(RelayError::Aborted(why));
                }
                _ => {
                    let _ = answer.send(false);
                }
            },
        }
    }
}

/// A unix socket of our own at `path`; what a dead predecessor left there is taken away.
pub(crate) fn listen(path: &Path, what: &'static str) -> Result<UnixListener, RelayError> {
    use std::os::unix::fs::{FileTypeExt, PermissionsExt};
    let fail = |source| RelayError::Socket { what, path: path.to_owned(), source };
    if let Ok(meta) = std::fs::symlink_metadata(path)
        && meta.file_type().is_socket()
    {
        std::fs::remove_file(path).map_err(fail)?;
    }
    let listener = UnixListener::bind(path).map_err(fail)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(fail)?;
    Ok(listener)
}

#[cfg(test)]
mod tests {
    use godwit_transfer::{Authority, PendingIdentity};
    use godwit_types::{Name, SiteKind};

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_relay_that_runs_takes_newer_lists_of_revoked_certificates_of_its_authority() {
        let dir = tempfile::tempdir().expect("dir");
        let make = |n: &str| Authority::create(&dir.path().join(n)).expect("authority");
        let (ours, other) = (make("ours"), make("other"));
        let cafe = Name::new("cafe").expect("name");
        let revoke = |a: &Authority| {
            let pending = PendingIdentity::make(&cafe, SiteKind::Ap).expect("key");
            a.issue(pending.request(), &cafe, SiteKind::Ap).expect("issued");
            a.revoke_site(&cafe).expect("revoked")
        };
        let trust = Trust::new(ours.certificate(), Revocations::default());
        let trust = trust.expect("trust");
        let file = dir.path().join("revoked");
        let _task = follow_revocations(trust.clone(), file.clone());
        let pass = || tokio::time::sleep(READ_REVOKED_EVERY * 2);
        pass().await;
        assert_eq!(trust.revocations().number, 0);
        revoke(&other).save(&file).expect("written");
        pass().await;
        assert_eq!(trust.revocations().number, 0, "another authority's");
        let list = revoke(&ours);
        list.save(&file).expect("written");
        pass().await;
        assert_eq!(trust.revocations().number, list.number);
        assert_eq!(trust.revocations().serials.len(), 1);
    }
}
