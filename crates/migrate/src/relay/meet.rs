//! How the two relays of a migration come to have a link: who dials is apart from who sends.
//!
//! ```text
//!                      usual                        destination that nobody can reach
//! source          dials the destination        listens until it is dialled
//! destination     listens until it is dialled  is told where the source listens, and dials
//! ```
//!
//! Either way both ends have checked the other one's certificate before anything else crosses,
//! and the source opens the lanes.

use std::net::SocketAddr;
use std::time::Duration;

use futures::future::OptionFuture;
use godwit_transfer::{Endpoint, Link};
use tokio::sync::{mpsc, watch};

use super::control::Asked;
use super::{Meeting, RelayCommand, RelayConfig, RelayError, RelayRole, RelayStatus};

/// How long a source waits for a destination that has to dial.
const COME_WITHIN: Duration = Duration::from_secs(60);
const FOR_EVER: Duration = Duration::from_secs(u32::MAX as u64);

/// Opens or awaits the link to the other relay. One that listens may be told meanwhile to dial
/// ([`RelayCommand::Dial`]); an address at which nobody answers costs nothing, and it may be told
/// again.
pub(super) async fn meet(
    config: &RelayConfig,
    endpoint: &Endpoint,
    status: &watch::Sender<RelayStatus>,
    commands: &mut mpsc::Receiver<Asked>,
) -> Result<Link, RelayError> {
    let link = link(config, endpoint, status, commands).await?;
    status.send_modify(|s| s.met = true);
    Ok(link)
}

async fn link(
    config: &RelayConfig,
    endpoint: &Endpoint,
    status: &watch::Sender<RelayStatus>,
    commands: &mut mpsc::Receiver<Asked>,
) -> Result<Link, RelayError> {
    let fail = |source| RelayError::Link { peer: config.peer.to_string(), source };
    if let Meeting::Dial(address) = config.meeting {
        return super::unless_aborted(commands, dial(config, endpoint, address)).await;
    }
    let late = tokio::time::sleep(match config.role {
        RelayRole::Source => COME_WITHIN,
        // Its source tells when it does not come.
        RelayRole::Destination => FOR_EVER,
    });
    tokio::pin!(late);
    let address = endpoint.local_address().map_err(fail)?;
    status.send_modify(|s| s.listening = Some(address));
    let mut dialled = None;
    let dialling: OptionFuture<_> = None.into();
    tokio::pin!(dialling);
    loop {
        let told = tokio::select! {
            link = accept(config, endpoint) => return link,
            Some(link) = &mut dialling, if dialled.is_some() => match link {
                Ok(link) => return Ok(link),
                Err(error) => {
                    tracing::warn!(%error, "the other relay is not reached");
                    dialled = None;
                    continue;
                }
            },
            Some(told) = commands.recv() => told,
            () = &mut late => {
                return Err(RelayError::NobodyCame { peer: config.peer.to_string(), address });
            }
        };
        match told {
            (RelayCommand::Abort { why }, answer) => {
                let _ = answer.send(true);
                return Err(RelayError::Aborted(why));
            }
            (RelayCommand::Dial { address }, answer) => {
                // One that is under way goes on: the other end may count on it already.
                if dialled != Some(address) {
                    dialled = Some(address);
                    dialling.set(Some(dial(config, endpoint, address)).into());
                }
                let _ = answer.send(true);
            }
            (_, answer) => {
                let _ = answer.send(false);
            }
        }
    }
}

async fn dial(
    config: &RelayConfig,
    endpoint: &Endpoint,
    address: SocketAddr,
) -> Result<Link, RelayError> {
    let link = endpoint.connect(address, Some(&config.peer)).await;
    link.map_err(|source| RelayError::Link { peer: config.peer.to_string(), source })
}

/// Waits for the other relay; whoever else comes is sent away.
async fn accept(config: &RelayConfig, endpoint: &Endpoint) -> Result<Link, RelayError> {
    loop {
        let link = endpoint.accept().await.ok_or(RelayError::Protocol("the endpoint is closed"))?;
        if link.peer().name == config.peer {
            return Ok(link);
        }
        let e = RelayError::WrongPeer {
            found: link.peer().name.to_string(),
            expected: config.peer.to_string(),
        };
        tracing::warn!(error = %e, "refusing a relay");
        link.close(&e.to_string());
    }
}
