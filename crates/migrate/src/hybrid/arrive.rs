//! Carries out what the destination's table asks for.

use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::time::Duration;

use godwit_disk::MidLayer;
use godwit_qemu::{DiskLayer, EventCursor, Layer, Life, Machine, MigrationStatus, Node};
use tokio::sync::watch;

use super::measure::now;
use super::run::{lost, qemu};
use super::{
    DestinationDriver, DestinationEffect, DestinationEvent, DestinationState, MoveError, Received,
};
use crate::relay::{Counts, RelayClient, RelayCommand, RelayPhase, RelayStatus};

/// How long the pivot waits until QEMU lets a migrated machine's devices be changed.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// How long a QEMU may take to run or to fail once its relay is lost.
const RUN_OR_FAIL: Duration = Duration::from_secs(3);

/// The disk of a machine that arrives.
#[derive(Debug)]
pub struct ArrivingDisk {
    /// The chain below `top` once the source is not needed any more: base and middle layer.
    pub layers: Vec<DiskLayer>,
    /// Where the relay fills the middle layer, if that is elsewhere.
    pub filled: Option<PathBuf>,
    /// Unix socket on which QEMU tells the relay what the guest overwrites.
    pub written: PathBuf,
}

/// An answer on its way: whether it was written down that the machine runs here.
pub type Committed = Pin<Box<dyn Future<Output = bool> + Send>>;

/// Sees that the relay has ended, so that it writes nothing down any more, and reads what it has
/// written.
pub type AskCommitted<'a> = &'a (dyn Fn() -> Committed + Send + Sync);

/// Takes in a machine through the destination relay behind `client`. `machine` listens for the
/// relay already ([`prepare_incoming`]). Returns when the machine is independent
/// of its source; the relay may be told to finish then. When something is lost before the relay has
/// told of the commit point, `committed` says whether it has passed; without it the machine's QEMU
/// does, by running.
///
/// # Errors
/// [`MoveError::Cancelled`] (the machine never ran here, and its QEMU is gone),
/// [`MoveError::Interrupted`] (it runs here; start the relays anew and call this again). What was
/// measured until then is in `received`, and is added to when it is called again.
pub async fn receive(
    machine: &Machine,
    client: &RelayClient,
    disk: Option<ArrivingDisk>,
    received: &mut Received,
    resumed: bool,
    committed: Option<AskCommitted<'_>>,
) -> Result<(), MoveError> {
    let driver = if resumed { DestinationDriver::resumed() } else { DestinationDriver::new() };
    let events = machine.events();
    let before = received.counts;
    let passed = resumed;
    let mut arrival =
        Arriving { machine, client, disk, driver, received, before, events, committed, passed };
    arrival.drive(client.watch()).await
}

/// Gives the middle layer that a relay has filled at `filled` its place in `layers`.
async fn take_over(filled: &Path, layers: &[DiskLayer]) -> Result<(), MoveError> {
    for l in layers.iter().filter(|l| l.node == Node::Mid) {
        let Layer::Qcow2 { path } = &l.layer else { continue };
        let (from, to) = (filled.to_owned(), path.clone());
        let taken = tokio::task::spawn_blocking(move || MidLayer::take_over(&from, &to)).await;
        taken.map_err(|_| MoveError::LayerWorker)?.map_err(MoveError::Layer)?;
    }
    Ok(())
}

struct Arriving<'a> {
    machine: &'a Machine,
    client: &'a RelayClient,
    disk: Option<ArrivingDisk>,
    driver: DestinationDriver,
    received: &'a mut Received,
    /// What earlier relays of this migration counted.
    before: Counts,
    events: EventCursor,
    committed: Option<AskCommitted<'a>>,
    /// The relay has told of the commit point.
    passed: bool,
}

impl Arriving<'_> {
    async fn drive(&mut self, mut status: watch::Receiver<RelayStatus>) -> Result<(), MoveError> {
        loop {
            let seen = status.borrow_and_update().clone();
            self.received.counts = self.before.plus(&seen.counts);
            self.passed |= seen.committed;
            if seen.phase >= RelayPhase::Done {
                self.received.complete.get_or_insert_with(now);
            }
            self.apply(DestinationEvent::Relay(seen.phase)).await?;
            if let Some(why) = lost(&seen) {
                self.apply(DestinationEvent::Lost { why }).await?;
            }
            match self.driver.state() {
                DestinationState::Moved => {
                    self.received.independent = Some(now());
                    return Ok(());
                }
                DestinationState::Gone { why } => {
                    return Err(MoveError::Cancelled { why: why.clone() });
                }
                DestinationState::Interrupted { why } => {
                    return Err(MoveError::Interrupted { why: why.clone() });
                }
                _ => {}
            }
            tokio::select! {
                biased;
                event = self.events.next() => match event {
                    Some(event) if event.name == "RESUME" => {
                        self.received.resumed.get_or_insert(event.at);
                        self.apply(DestinationEvent::Runs).await?;
                    }
                    Some(event) if event.migration_status() == Some("failed") => {
                        let info = self.machine.query_migrate().await;
                        let why = info.ok().and_then(|i| i.error);
                        let why = why.unwrap_or_else(|| "QEMU could not take the state".into());
                        self.apply(DestinationEvent::Lost { why }).await?;
                    }
                    Some(_) => {}
                    None => {
                        let why = "the destination's QEMU has ended".into();
                        self.apply(DestinationEvent::Lost { why }).await?;
                    }
                },
                changed = status.changed() => {
                    if changed.is_err() {
                        let why = "the relay at the destination is gone".into();
                        self.apply(DestinationEvent::Lost { why }).await?;
                    }
                }
            }
        }
    }

    async fn apply(&mut self, event: DestinationEvent) -> Result<(), MoveError> {
        let event = self.weighed(event).await?;
        let lost = matches!(event, DestinationEvent::Lost { .. });
        let todo = if lost && self.driver.is_open() && self.runs_here().await {
            // The relay went without telling that PONG 3 had passed.
            self.driver.on(DestinationEvent::Runs).map_err(MoveError::State)?;
            self.driver.on(event).map_err(MoveError::State)?
        } else {
            self.driver.on(event).map_err(MoveError::State)?
        };
        for effect in todo {
            match effect {
                DestinationEffect::Offer => {
                    let Some(disk) = &self.disk else { continue };
                    let offered = async {
                        self.settle().await?;
                        let offer = self.machine.offer_written(&disk.written).await;
                        offer.map_err(qemu("offering what the guest overwrites"))
                    };
                    if let Err(error) = offered.await {
                        // Blocks travel then that nobody will read; no more than that.
                        tracing::warn!(%error, "what the guest overwrites still travels");
                    }
                }
                DestinationEffect::Pivot => {
                    self.settle().await?;
                    if let Some(ArrivingDisk { layers, filled, .. }) = self.disk.take() {
                        if let Some(filled) = filled {
                            take_over(&filled, &layers).await?;
                        }
                        self.machine.withdraw_written().await;
                        let took = self
                            .machine
                            .pivot_backing(layers)
                            .await
                            .map_err(qemu("pivoting the disk away from the source"))?;
                        self.received.pivot = Some(took);
                    }
                    self.driver.on(DestinationEvent::Pivoted).map_err(MoveError::State)?;
                }
                DestinationEffect::EndQemu => {
                    self.machine.kill().await;
                    let why = "the machine never ran here".into();
                    let _ = self.client.command(&RelayCommand::Abort { why }).await;
                }
            }
        }
        Ok(())
    }

    /// What a loss means where the commit point is written down: until it is, a machine that runs
    /// here was taken from nobody.
    async fn weighed(&mut self, event: DestinationEvent) -> Result<DestinationEvent, MoveError> {
        let (DestinationEvent::Lost { why }, Some(committed), false) =
            (&event, self.committed, self.passed || self.driver.is_over())
        else {
            return Ok(event);
        };
        let refused = self.client.status().refused;
        if let Some(why) = refused {
            return Ok(DestinationEvent::NotCommitted { why });
        }
        if committed().await {
            self.passed = true;
            self.driver.on(DestinationEvent::Runs).map_err(MoveError::State)?;
            return Ok(event);
        }
        Ok(DestinationEvent::NotCommitted { why: why.clone() })
    }

    /// Whether the machine runs here. A QEMU that has read its whole device state may be just
    /// about to, so it is given a moment to run or to fail.
    async fn runs_here(&self) -> bool {
        let deadline = tokio::time::Instant::now() + RUN_OR_FAIL;
        loop {
            match tokio::time::timeout_at(deadline, self.machine.life()).await {
                Ok(Ok(Life::Running)) => return true,
                Ok(Ok(Life::Exited) | Err(_)) => return false,
                Ok(Ok(_)) => {}
                // It waits for a page: it runs if it has said so.
                Err(_) => return self.has_run(),
            }
            let over = tokio::time::timeout_at(deadline, self.machine.query_migrate()).await;
            if !matches!(over, Ok(Ok(info)) if !info.status.is_final()) {
                return self.has_run();
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Whether QEMU has told of its RESUME.
    fn has_run(&self) -> bool {
        self.received.resumed.is_some() || self.machine.has_reported("RESUME")
    }

    /// Waits until QEMU counts the machine's arrival as complete.
    async fn settle(&self) -> Result<(), MoveError> {
        self.machine
            .wait_migration("ending the arrival", &[MigrationStatus::Completed], SETTLE_WITHIN)
            .await
            .map_err(qemu("ending the arrival of the machine"))?;
        Ok(())
    }
}
