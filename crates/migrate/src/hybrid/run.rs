//! Carries out what the tables ask for.

use std::path::Path;
use std::time::Duration;

use godwit_qemu::{
    Capability, DiskLayer, Event, EventCursor, Life, Machine, MigrationStatus, Parameters,
    QemuError,
};
use godwit_types::{Code, CodedError, InvalidTransition};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::measure::now;
use super::{
    DestinationDriver, DestinationEffect, DestinationEvent, DestinationState, Received, Sent,
    SourceDriver, SourceEffect, SourceEnd, SourceEvent, SourceState,
};
use crate::relay::{RelayClient, RelayCommand, RelayEnd, RelayError, RelayPhase, RelayStatus};

/// How long QEMU may take to tell of its STOP or RESUME once it must have happened.
const EVENT_WITHIN: Duration = Duration::from_secs(30);
/// How long the pivot waits until QEMU lets a migrated machine's devices be changed.
const SETTLE_WITHIN: Duration = Duration::from_secs(30);
/// How long a QEMU may take to run or to fail once its relay is lost.
const RUN_OR_FAIL: Duration = Duration::from_secs(3);

/// Why a migration could not be driven on.
#[derive(Debug, thiserror::Error)]
pub enum MoveError {
    /// QEMU refused or failed.
    #[error("{what}")]
    Qemu {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: QemuError,
    },
    /// The relay is gone or does not answer.
    #[error("{what}")]
    Relay {
        /// What was being done.
        what: &'static str,
        /// Why.
        #[source]
        source: RelayError,
    },
    /// The relay refused a command: it is not where the driver takes it to be.
    #[error("the relay refused to {0}")]
    RelayRefused(&'static str),
    /// The state does not allow it.
    #[error("driving the migration on")]
    State(#[source] InvalidTransition),
    /// The machine never ran at the destination; it runs at the source.
    #[error("the migration was given up before the machine left its source: {why}")]
    Cancelled {
        /// Why.
        why: String,
    },
    /// The destination was lost while the machine stood still; it runs at the source again.
    #[error(
        "the destination was lost during the switch, and the machine runs on at its source: {why}"
    )]
    Reclaimed {
        /// What was lost.
        why: String,
    },
    /// The machine runs at the destination and still needs its source.
    #[error(
        "the machine runs at its destination, but the link to its source was lost before everything had arrived ({why}); start the relays anew to go on"
    )]
    Interrupted {
        /// What was lost.
        why: String,
    },
    /// It is not known where the machine may run.
    #[error(
        "the destination was lost during the switch ({why}) and cannot be asked whether the machine runs there; it is held at its source until it can"
    )]
    Uncertain {
        /// What was lost.
        why: String,
    },
}

impl CodedError for MoveError {
    fn code(&self) -> Code {
        match self {
            Self::Qemu { source, .. } => source.code(),
            Self::Relay { source, .. } => source.code(),
            Self::RelayRefused(_) | Self::State(_) => Code::Conflict,
            Self::Cancelled { .. } => Code::Cancelled,
            Self::Reclaimed { .. } | Self::Interrupted { .. } | Self::Uncertain { .. } => {
                Code::Unavailable
            }
        }
    }
}

fn qemu(what: &'static str) -> impl Fn(QemuError) -> MoveError {
    move |source| MoveError::Qemu { what, source }
}

fn relay(what: &'static str) -> impl Fn(RelayError) -> MoveError {
    move |source| MoveError::Relay { what, source }
}

/// What the destination, or the center for it, says when the source asks whether the machine runs
/// there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DestinationFate {
    /// It never ran there, and its QEMU is gone for good.
    Dead,
    /// It runs there.
    Runs,
    /// Nobody can tell now.
    Unknown,
}

/// A question for the fate of a destination, on its way.
pub type Asking = std::pin::Pin<Box<dyn Future<Output = DestinationFate> + Send>>;

/// Capabilities of both ends of a hybrid migration.
const CAPABILITIES: [Capability; 3] =
    [Capability::PostcopyRam, Capability::PostcopyPreempt, Capability::ReturnPath];

/// Lets the waiting `machine` listen on the unix socket `socket` for its relay.
///
/// # Errors
/// [`MoveError::Qemu`].
pub async fn prepare_incoming(machine: &Machine, socket: &Path) -> Result<(), MoveError> {
    let doing = qemu("preparing the destination's QEMU");
    machine.set_capabilities(&CAPABILITIES).await.map_err(&doing)?;
    machine.migrate_incoming(socket).await.map_err(&doing)
}

/// After a break: lets the destination's QEMU listen on `socket` for a new relay.
///
/// # Errors
/// [`MoveError::Qemu`].
pub async fn recover_incoming(machine: &Machine, socket: &Path) -> Result<(), MoveError> {
    let doing = qemu("recovering the destination's QEMU");
    machine
        .wait_migration("waiting for the break", &[MigrationStatus::PostcopyPaused], EVENT_WITHIN)
        .await
        .map_err(&doing)?;
    machine.migrate_recover(socket).await.map_err(&doing)
}

/// After a break: lets the source's QEMU go on through the new relay whose QEMU socket is
/// `socket`, and drives the migration to its end.
///
/// # Errors
/// As [`send`].
pub async fn recover_outgoing(
    machine: &Machine,
    client: &RelayClient,
    socket: &Path,
    sent: Sent,
) -> Result<Sent, MoveError> {
    let doing = qemu("recovering the source's QEMU");
    machine
        .wait_migration("waiting for the break", &[MigrationStatus::PostcopyPaused], EVENT_WITHIN)
        .await
        .map_err(&doing)?;
    let joined = client
        .wait(|s| s.phase >= RelayPhase::Waiting)
        .await
        .map_err(relay("waiting for the new relays"))?;
    if let Some(why) = lost(&joined) {
        return Err(MoveError::Interrupted { why });
    }
    machine.migrate_resume(socket).await.map_err(&doing)?;
    let mut source = Source {
        machine,
        client,
        socket,
        driver: SourceDriver::resumed(),
        sent,
        events: machine.events(),
    };
    source
        .drive(&CancellationToken::new(), || -> Asking {
            Box::pin(async { DestinationFate::Unknown })
        })
        .await?;
    Ok(source.sent)
}

/// What a relay that has ended, or lost its peer, has lost.
fn lost(status: &RelayStatus) -> Option<String> {
    match (&status.end, &status.lost) {
        (Some(RelayEnd::Aborted { why } | RelayEnd::Broken { why }), _) | (None, Some(why)) => {
            Some(why.clone())
        }
        _ => None,
    }
}

struct Source<'a> {
    machine: &'a Machine,
    client: &'a RelayClient,
    socket: &'a Path,
    driver: SourceDriver,
    sent: Sent,
    events: EventCursor,
}

/// Sends the running `machine` through the source relay behind `client`, whose QEMU socket is
/// `socket`. Returns when the destination needs nothing more of the source; the machine's QEMU is
/// then in [`Life::PostMigrate`] and may be ended. `ask` is called only when the destination is
/// lost during the switch.
///
/// `cancel` is heeded until QEMU is told to switch, and ignored afterwards.
///
/// # Errors
/// [`MoveError`]: each says where the machine is.
pub async fn send(
    machine: &Machine,
    client: &RelayClient,
    socket: &Path,
    cancel: &CancellationToken,
    ask: impl Fn() -> Asking,
) -> Result<Sent, MoveError> {
    let mut source = Source {
        machine,
        client,
        socket,
        driver: SourceDriver::new(),
        sent: Sent { asked: now(), ..Sent::default() },
        events: machine.events(),
    };
    source.drive(cancel, ask).await?;
    Ok(source.sent)
}

impl Source<'_> {
    async fn drive(
        &mut self,
        cancel: &CancellationToken,
        ask: impl Fn() -> Asking,
    ) -> Result<(), MoveError> {
        let mut status = self.client.watch();
        loop {
            let seen = status.borrow_and_update().clone();
            self.sent.counts = seen.counts;
            self.apply(SourceEvent::Relay(seen.phase), &ask).await?;
            if let Some(why) = lost(&seen) {
                self.lost(why, &ask).await?;
            }
            if let SourceState::Ended(end) = self.driver.state() {
                return self.ended(end.clone()).await;
            }
            if cancel.is_cancelled() && self.driver.can_cancel() {
                self.apply(SourceEvent::Cancel { why: "on request".into() }, &ask).await?;
                continue;
            }
            let may_cancel = self.driver.can_cancel();
            tokio::select! {
                () = cancel.cancelled(), if may_cancel => {}
                changed = status.changed() => {
                    if changed.is_err() {
                        self.lost("the relay at the source is gone".into(), &ask).await?;
                    }
                }
                event = self.events.next() => match event {
                    Some(event) => self.heard(&event, &ask).await?,
                    None => self.lost("the source's QEMU has ended".into(), &ask).await?,
                },
            }
            if let SourceState::Ended(end) = self.driver.state() {
                return self.ended(end.clone()).await;
            }
        }
    }

    async fn lost(&mut self, why: String, ask: &impl Fn() -> Asking) -> Result<(), MoveError> {
        self.apply(SourceEvent::Lost { why }, ask).await
    }

    async fn heard(&mut self, event: &Event, ask: &impl Fn() -> Asking) -> Result<(), MoveError> {
        if event.name == "STOP" && self.sent.stopped.is_none() {
            self.sent.stopped = Some(event.at);
        }
        if event.migration_status() == Some("failed") {
            let info =
                self.machine.query_migrate().await.map_err(qemu("asking QEMU what failed"))?;
            let why = info.error.unwrap_or_else(|| "QEMU's migration failed".into());
            self.lost(why, ask).await?;
        }
        Ok(())
    }

    async fn apply(
        &mut self,
        event: SourceEvent,
        ask: &impl Fn() -> Asking,
    ) -> Result<(), MoveError> {
        let before = self.driver.state().clone();
        let mut todo =
            std::collections::VecDeque::from(self.driver.on(event).map_err(MoveError::State)?);
        let at = now();
        if before != SourceState::Drain && *self.driver.state() == SourceState::Drain {
            self.sent.round_over.get_or_insert(at);
        }
        while let Some(effect) = todo.pop_front() {
            match self.carry_out(effect, ask).await {
                Ok(Some(event)) => todo.extend(self.driver.on(event).map_err(MoveError::State)?),
                Ok(None) => {}
                // What cannot be done before the switch ends the migration; the machine stays.
                Err(e)
                    if self.driver.can_cancel() || self.driver.state() == &SourceState::Freeze =>
                {
                    let why = in_full(&e);
                    todo.extend(
                        self.driver.on(SourceEvent::Lost { why }).map_err(MoveError::State)?,
                    );
                }
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    async fn carry_out(
        &mut self,
        effect: SourceEffect,
        ask: &impl Fn() -> Asking,
    ) -> Result<Option<SourceEvent>, MoveError> {
        match effect {
            SourceEffect::Migrate => {
                let doing = qemu("starting QEMU's migration");
                let fast = Parameters {
                    max_bandwidth: Some(0),
                    max_postcopy_bandwidth: Some(0),
                    // QEMU shall leave the switch to us, not finish pre-copy by itself.
                    downtime_limit_ms: Some(1),
                };
                self.machine.set_capabilities(&CAPABILITIES).await.map_err(&doing)?;
                self.machine.set_parameters(fast).await.map_err(&doing)?;
                self.machine.migrate_to(self.socket).await.map_err(&doing)?;
                self.sent.began = Some(now());
            }
            SourceEffect::StartPostcopy => {
                self.sent.switched = Some(now());
                self.machine.start_postcopy().await.map_err(qemu("telling QEMU to switch"))?;
            }
            SourceEffect::Proceed => self.tell(&RelayCommand::Proceed, "read on").await?,
            SourceEffect::AbortRelay { why } => {
                // A relay that is gone needs no telling.
                let _ = self.client.command(&RelayCommand::Abort { why }).await;
            }
            SourceEffect::Undo => {
                self.undo().await?;
                return Ok(Some(SourceEvent::Undone));
            }
            SourceEffect::AskDestination => match ask().await {
                DestinationFate::Runs => return Ok(Some(SourceEvent::DestinationRuns)),
                DestinationFate::Dead => {
                    let info = self
                        .machine
                        .query_migrate()
                        .await
                        .map_err(qemu("asking QEMU how its migration stands"))?;
                    // QEMU lets the machine run again when it fails before it has sent it off.
                    let failed =
                        matches!(info.status, MigrationStatus::Failed | MigrationStatus::Cancelled);
                    return Ok(Some(if failed {
                        SourceEvent::Undone
                    } else {
                        SourceEvent::DestinationDead
                    }));
                }
                DestinationFate::Unknown => {
                    let SourceState::Uncertain { why } = self.driver.state().clone() else {
                        return Ok(None);
                    };
                    return Err(MoveError::Uncertain { why });
                }
            },
            SourceEffect::Reclaim => {
                self.tell(&RelayCommand::Reclaim, "bring the machine back").await?;
                let after = self
                    .client
                    .wait(|s| s.end.is_some())
                    .await
                    .map_err(relay("bringing the machine back"))?;
                if after.end != Some(RelayEnd::Reclaimed) {
                    let why = lost(&after).unwrap_or_default();
                    return Err(MoveError::Uncertain { why });
                }
                self.machine
                    .wait_migration(
                        "bringing the machine back",
                        &[MigrationStatus::Completed],
                        EVENT_WITHIN,
                    )
                    .await
                    .map_err(qemu("bringing the machine back"))?;
                return Ok(Some(SourceEvent::Reclaimed));
            }
            SourceEffect::Run => {
                self.machine.run().await.map_err(qemu("letting the machine run on"))?;
            }
        }
        Ok(None)
    }

    async fn tell(&self, command: &RelayCommand, what: &'static str) -> Result<(), MoveError> {
        let accepted =
            self.client.command(command).await.map_err(relay("commanding the source relay"))?;
        if accepted { Ok(()) } else { Err(MoveError::RelayRefused(what)) }
    }

    async fn undo(&self) -> Result<(), MoveError> {
        let doing = qemu("undoing the migration");
        let status = self.machine.query_migrate().await.map_err(&doing)?.status;
        if !status.is_final() && status != MigrationStatus::None {
            self.machine.migrate_cancel().await.map_err(&doing)?;
        }
        if self.machine.life().await.map_err(&doing)? != Life::Running {
            self.machine.run().await.map_err(&doing)?;
        }
        Ok(())
    }

    async fn ended(&mut self, end: SourceEnd) -> Result<(), MoveError> {
        match end {
            SourceEnd::Moved => {}
            SourceEnd::Cancelled { why } => return Err(MoveError::Cancelled { why }),
            SourceEnd::Reclaimed { why } => return Err(MoveError::Reclaimed { why }),
            SourceEnd::Interrupted { why } => return Err(MoveError::Interrupted { why }),
        }
        self.sent.released = Some(now());
        self.machine
            .wait_migration("ending the migration", &[MigrationStatus::Completed], EVENT_WITHIN)
            .await
            .map_err(qemu("ending QEMU's migration"))?;
        if self.sent.stopped.is_none() {
            let stop = self
                .events
                .wait_named("STOP", EVENT_WITHIN)
                .await
                .map_err(|e| qemu("waiting for QEMU's STOP")(e.into()))?;
            self.sent.stopped = Some(stop.at);
        }
        Ok(())
    }
}

fn in_full(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut cause = e.source();
    while let Some(e) = cause {
        text.push_str(": ");
        text.push_str(&e.to_string());
        cause = e.source();
    }
    text
}

/// Takes in a machine through the destination relay behind `client`. `machine` listens for the
/// relay already ([`prepare_incoming`]). With a disk, `pivot` is the chain below `top` once the
/// source is not needed any more (base and middle layer). Returns when the machine is independent
/// of its source; the relay may be told to finish then.
///
/// # Errors
/// [`MoveError::Cancelled`] (the machine never ran here, and its QEMU is gone),
/// [`MoveError::Interrupted`] (it runs here; start the relays anew and call this again).
pub async fn receive(
    machine: &Machine,
    client: &RelayClient,
    pivot: Option<Vec<DiskLayer>>,
    resumed: bool,
) -> Result<Received, MoveError> {
    let driver = if resumed { DestinationDriver::resumed() } else { DestinationDriver::new() };
    let events = machine.events();
    let received = Received::default();
    let mut arrival = Arriving { machine, client, pivot, driver, received, events };
    arrival.drive(client.watch()).await?;
    Ok(arrival.received)
}

struct Arriving<'a> {
    machine: &'a Machine,
    client: &'a RelayClient,
    pivot: Option<Vec<DiskLayer>>,
    driver: DestinationDriver,
    received: Received,
    events: EventCursor,
}

impl Arriving<'_> {
    async fn drive(&mut self, mut status: watch::Receiver<RelayStatus>) -> Result<(), MoveError> {
        loop {
            let seen = status.borrow_and_update().clone();
            self.received.counts = seen.counts;
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
        let lost = matches!(event, DestinationEvent::Lost { .. });
        let todo = if lost && self.runs_here().await {
            // The relay went without telling that PONG 3 had passed.
            self.driver.on(DestinationEvent::Runs).map_err(MoveError::State)?;
            self.driver.on(event).map_err(MoveError::State)?
        } else {
            self.driver.on(event).map_err(MoveError::State)?
        };
        for effect in todo {
            match effect {
                DestinationEffect::Pivot => {
                    self.settle().await?;
                    if let Some(layers) = self.pivot.take() {
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

    /// Whether the machine runs here. A QEMU that has read its whole device state may be just
    /// about to, so it is given a moment to run or to fail.
    async fn runs_here(&self) -> bool {
        let deadline = tokio::time::Instant::now() + RUN_OR_FAIL;
        loop {
            match self.machine.life().await {
                Ok(Life::Running) => return true,
                Ok(Life::Exited) | Err(_) => return false,
                Ok(_) => {}
            }
            let over = match self.machine.query_migrate().await {
                Ok(info) => info.status.is_final(),
                Err(_) => true,
            };
            if over || tokio::time::Instant::now() >= deadline {
                return false;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
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
