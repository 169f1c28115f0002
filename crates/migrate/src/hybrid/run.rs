//! Carries out what the tables ask for.

use std::path::Path;
use std::time::Duration;

use godwit_qemu::{
    Capability, Event, EventCursor, Life, Machine, MigrationStatus, Parameters, QemuError,
};
use godwit_types::{Code, CodedError, InvalidTransition};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::keeper::{Keeper, is_before_switch};
use super::measure::now;
use super::{Sent, SourceDriver, SourceEffect, SourceEnd, SourceEvent, SourceState, recover};
use crate::relay::{
    Counts, RelayClient, RelayCommand, RelayEnd, RelayError, RelayPhase, RelayStatus,
};

/// How long QEMU may take to tell of its STOP or RESUME once it must have happened.
pub(super) const EVENT_WITHIN: Duration = Duration::from_secs(30);

/// How long QEMU may take to say how it is, before it is taken to wait for its stream to be read.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

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
    /// The disk that has come can't be given to its machine.
    #[error("taking over the disk that has come")]
    Layer(#[source] godwit_disk::DiskError),
    /// The same, for no reason that is known.
    #[error("taking over the disk that has come: its worker has ended")]
    LayerWorker,
    /// The machine never ran at the destination; it runs at the source.
    #[error("the migration was given up before the machine left its source: {why}")]
    Cancelled {
        /// Why.
        why: String,
    },
    /// The machine's QEMU ended at its source, and it never ran at the destination. Its disk is
    /// whole.
    #[error("the machine ended at its source before it had moved: {why}")]
    Ended {
        /// How it ended.
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
    /// QEMU itself was cut off in the midst of handing the machine over.
    #[error(
        "the relay was lost while QEMU handed over the machine's device state, and QEMU cannot be taken back from there: its memory is lost, its disk is not"
    )]
    Stuck,
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
            Self::Stuck | Self::Ended { .. } => Code::Damaged,
            Self::RelayRefused(_) | Self::State(_) => Code::Conflict,
            Self::Layer(e) => e.code(),
            Self::LayerWorker => Code::Internal,
            Self::Cancelled { .. } => Code::Cancelled,
            Self::Reclaimed { .. } | Self::Interrupted { .. } | Self::Uncertain { .. } => {
                Code::Unavailable
            }
        }
    }
}

impl MoveError {
    /// Whether the source keeps what it has of the machine after this: it may still be needed, or
    /// nobody knows yet where the machine runs.
    #[must_use]
    pub const fn keeps_source(&self) -> bool {
        !matches!(self, Self::Cancelled { .. } | Self::Reclaimed { .. } | Self::Ended { .. })
    }
}

/// How a QEMU ended, in half a line; `None` while it is there.
pub(super) async fn end_of(machine: &Machine) -> Option<String> {
    if !matches!(machine.life().await, Ok(Life::Exited)) {
        return None;
    }
    let exit = machine.exited().await;
    Some(if machine.has_powered_off() {
        "its guest powered itself off".to_owned()
    } else {
        exit.brief()
    })
}

pub(super) fn qemu(what: &'static str) -> impl Fn(QemuError) -> MoveError {
    move |source| MoveError::Qemu { what, source }
}

pub(super) fn relay(what: &'static str) -> impl Fn(RelayError) -> MoveError {
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
/// Those of the source: it must not end by itself while its relay does not read, for it holds its
/// main lock then.
const AT_SOURCE: [Capability; 4] = [
    Capability::PostcopyRam,
    Capability::PostcopyPreempt,
    Capability::ReturnPath,
    Capability::SwitchoverAck,
];

/// Lets the waiting `machine` listen on the unix socket `socket` for its relay.
///
/// # Errors
/// [`MoveError::Qemu`].
pub async fn prepare_incoming(machine: &Machine, socket: &Path) -> Result<(), MoveError> {
    let doing = qemu("preparing the destination's QEMU");
    machine.set_capabilities(&CAPABILITIES).await.map_err(&doing)?;
    machine.migrate_incoming(socket).await.map_err(&doing)
}

/// What a relay that has ended, or lost its peer, has lost.
pub(super) fn lost(status: &RelayStatus) -> Option<String> {
    match (&status.end, &status.lost) {
        (Some(RelayEnd::Aborted { why } | RelayEnd::Broken { why }), _) | (None, Some(why)) => {
            Some(why.clone())
        }
        _ => None,
    }
}

/// How a migration that goes on is steered from outside.
#[derive(Debug, Clone)]
pub struct Steering {
    /// Heeded until QEMU is told to switch, and ignored afterwards.
    pub cancel: CancellationToken,
    /// Set when it is known from elsewhere that the destination is lost, and what was lost.
    pub lost: watch::Receiver<Option<String>>,
}

pub(super) struct Source<'a> {
    pub(super) machine: &'a Machine,
    pub(super) client: &'a RelayClient,
    pub(super) socket: &'a Path,
    pub(super) driver: SourceDriver,
    pub(super) sent: &'a mut Sent,
    /// What earlier relays of this migration counted.
    pub(super) before: Counts,
    pub(super) events: EventCursor,
    /// QEMU's STOP lies before the first event that is heard.
    pub(super) late: bool,
    /// Pages that hold the machine's virtio queues.
    pub(super) rings: Vec<u64>,
    /// QEMU's connection, held beside the relay from the switch on.
    pub(super) keeper: Option<Keeper>,
    /// The relay's descriptor of it that was asked for last.
    pub(super) kept: Option<i32>,
    /// The relay has let QEMU switch, and said so.
    pub(super) proceeded: bool,
}

/// Sends the running `machine` through the source relay behind `client`, whose QEMU socket is
/// `socket`. Returns when the destination needs nothing more of the source; the machine's QEMU is
/// then in [`Life::PostMigrate`] and may be ended. `ask` is called only when the destination is
/// lost during the switch. `sent` tells what was measured, also of a migration that failed.
///
/// # Errors
/// [`MoveError`]: each says where the machine is.
pub async fn send(
    machine: &Machine,
    client: &RelayClient,
    socket: &Path,
    sent: &mut Sent,
    steering: &Steering,
    ask: impl Fn() -> Asking,
) -> Result<(), MoveError> {
    *sent = Sent { asked: now(), ..Sent::default() };
    let mut source = Source {
        machine,
        client,
        socket,
        driver: SourceDriver::new(),
        sent,
        before: Counts::default(),
        events: machine.events(),
        late: false,
        rings: Vec::new(),
        keeper: None,
        kept: None,
        proceeded: false,
    };
    source.drive(steering, ask).await
}

impl Source<'_> {
    pub(super) async fn drive(
        &mut self,
        steering: &Steering,
        ask: impl Fn() -> Asking,
    ) -> Result<(), MoveError> {
        let driven = self.drive_on(steering, ask).await;
        if driven.as_ref().is_err_and(MoveError::keeps_source)
            && let Some(keeper) = self.keeper.take()
            && let Err(e) = keeper.leave(self.machine).await
        {
            tracing::warn!(error = %in_full(&e), "a machine that has left");
        }
        driven
    }

    /// Holds QEMU's connection beside a relay that has it.
    fn keep(&mut self, seen: &RelayStatus) {
        let wanted = seen.qemu_socket.is_some()
            && seen.qemu_socket != self.kept
            && seen.phase >= RelayPhase::Switching
            && seen.end.is_none();
        if wanted {
            self.kept = seen.qemu_socket;
            self.keeper = Keeper::take(seen, self.machine).or_else(|| self.keeper.take());
        }
    }

    async fn drive_on(
        &mut self,
        steering: &Steering,
        ask: impl Fn() -> Asking,
    ) -> Result<(), MoveError> {
        let Steering { cancel, lost: told } = steering;
        let mut told = told.clone();
        let mut status = self.client.watch();
        loop {
            if cancel.is_cancelled() && self.driver.can_cancel() {
                self.apply(SourceEvent::Cancel { why: "on request".into() }, &ask).await?;
            }
            let seen = status.borrow_and_update().clone();
            self.sent.counts = self.before.plus(&seen.counts);
            self.sent.clock = seen.clock.or(self.sent.clock);
            if seen.ram.is_some() {
                self.sent.ram.clone_from(&seen.ram);
            }
            self.apply(SourceEvent::Relay(seen.phase), &ask).await?;
            self.keep(&seen);
            let word = told.borrow_and_update().clone();
            if let Some(why) = lost(&seen).or(word) {
                self.lost(why, &ask).await?;
            }
            if let SourceState::Ended(end) = self.driver.state() {
                return self.ended(end.clone()).await;
            }
            let may_cancel = self.driver.can_cancel();
            tokio::select! {
                () = cancel.cancelled(), if may_cancel => {}
                Ok(()) = told.changed() => {}
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
        if event.name == "RESUME" && self.driver.is_beyond() {
            // A QEMU that loses its connection with nothing left to send takes the migration as
            // failed and lets its machine run. It runs at the destination.
            self.sent.ran_on = true;
            self.machine.stop().await.map_err(qemu("holding the machine that has left"))?;
        }
        if event.migration_status() == Some("failed") {
            // It fails, too, when QEMU ends, and when the relay has closed its connection because the
            // other one gave up: that one's words say why.
            let ended = self.client.wait(|s| lost(s).is_some());
            let why = match tokio::time::timeout(ANSWER_WITHIN, ended).await {
                Ok(Ok(RelayStatus { end: Some(RelayEnd::Aborted { why }), .. })) => Some(why),
                _ => self.machine.query_migrate().await.ok().and_then(|i| i.error),
            };
            self.lost(why.unwrap_or_else(|| "QEMU's migration failed".into()), ask).await?;
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
        let drains = |s: &SourceState| matches!(s, SourceState::Drain | SourceState::Arm);
        if !drains(&before) && drains(self.driver.state()) {
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
                    // A byte, so that QEMU ends as pre-copy only when nothing at all is dirty.
                    downtime_limit_ms: Some(1),
                    avail_switchover_bandwidth: Some(1000),
                };
                self.machine.set_capabilities(&AT_SOURCE).await.map_err(&doing)?;
                self.machine.set_parameters(fast).await.map_err(&doing)?;
                self.machine.migrate_to(self.socket).await.map_err(&doing)?;
                self.sent.began = Some(now());
                godwit_hold::at("move.precopy").await;
                // The guest's drivers laid them out long ago. Without them only the switch is slower.
                self.rings = self.machine.ring_pages().await.unwrap_or_else(|error| {
                    tracing::info!(%error, "where the virtio queues lie is not known");
                    Vec::new()
                });
            }
            SourceEffect::StartPostcopy => {
                godwit_hold::at("move.switching").await;
                self.sent.switched = Some(now());
                self.machine.start_postcopy().await.map_err(qemu("telling QEMU to switch"))?;
                return Ok(Some(SourceEvent::Armed));
            }
            SourceEffect::Proceed => {
                let first = std::mem::take(&mut self.rings);
                let status = self.client.status();
                self.keeper = Keeper::take(&status, self.machine);
                self.kept = status.qemu_socket;
                godwit_hold::at("move.keeping").await;
                self.command(&RelayCommand::Proceed { first }, "read on").await?;
                self.proceeded = true;
            }
            SourceEffect::AbortRelay { why } => {
                // A relay that is gone needs no telling.
                let _ = self.client.command(&RelayCommand::Abort { why }).await;
            }
            SourceEffect::Undo => {
                self.undo().await?;
                return Ok(Some(SourceEvent::Undone));
            }
            SourceEffect::AskDestination => {
                self.settle().await;
                let fate = ask().await;
                match fate {
                    DestinationFate::Runs => return Ok(Some(SourceEvent::DestinationRuns)),
                    DestinationFate::Dead => return self.without_destination().await.map(Some),
                    DestinationFate::Unknown => {
                        let SourceState::Uncertain { why } = self.driver.state().clone() else {
                            return Ok(None);
                        };
                        return Err(MoveError::Uncertain { why });
                    }
                }
            }
            SourceEffect::Reclaim => {
                if !self.reclaim_by_relay().await? {
                    match self.keeper.take() {
                        Some(keeper) => keeper.finish(self.machine).await?,
                        None => recover::reclaim(self.machine, self.socket).await?,
                    }
                    return Ok(Some(SourceEvent::Reclaimed));
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

    /// The machine never ran at its destination and never will: whether QEMU has to be brought back,
    /// or has given up by itself.
    async fn without_destination(&self) -> Result<SourceEvent, MoveError> {
        let asked = self.machine.query_migrate();
        match tokio::time::timeout(ANSWER_WITHIN, asked).await {
            // QEMU lets the machine run again when it fails before it has sent it off.
            Ok(Ok(info))
                if matches!(info.status, MigrationStatus::Failed | MigrationStatus::Cancelled) =>
            {
                Ok(SourceEvent::Undone)
            }
            // It was never let switch, and nobody is left who would.
            Ok(Ok(info)) if is_before_switch(info.status) && self.relay_is_gone() => {
                self.cancel_migration().await?;
                Ok(SourceEvent::Undone)
            }
            // One that is silent writes with its main lock held, and is read on now.
            Ok(Ok(_)) | Err(_) => Ok(SourceEvent::DestinationDead),
            Ok(Err(e)) => match end_of(self.machine).await {
                Some(why) => Err(MoveError::Ended { why }),
                None => Err(qemu("asking QEMU how its migration stands")(e)),
            },
        }
    }

    /// A QEMU whose relay is gone is read until it answers: its main lock may be held by a write.
    async fn settle(&mut self) {
        let gone = self.relay_is_gone();
        if let (Some(keeper), true) = (&mut self.keeper, gone) {
            keeper.settle(self.machine, self.proceeded).await;
        }
    }

    fn relay_is_gone(&self) -> bool {
        self.client.watch().has_changed().is_err() || self.client.status().end.is_some()
    }

    /// Cancels a migration that nobody reads any more, and lets the machine run on here.
    async fn cancel_migration(&self) -> Result<(), MoveError> {
        const DOING: &str = "cancelling a migration whose relay is gone";
        let ended =
            [MigrationStatus::Cancelled, MigrationStatus::Failed, MigrationStatus::Completed];
        let cancelled = async {
            self.machine.migrate_cancel().await?;
            self.machine.wait_migration(DOING, &ended, EVENT_WITHIN).await?;
            if self.machine.life().await? != Life::Running {
                self.machine.run().await?;
            }
            Ok(())
        };
        let Err(e) = cancelled.await else { return Ok(()) };
        match end_of(self.machine).await {
            Some(why) => Err(MoveError::Ended { why }),
            None => Err(qemu(DOING)(e)),
        }
    }

    /// Lets the relay take QEMU's stream to its end. `false` when there is no relay that could.
    async fn reclaim_by_relay(&self) -> Result<bool, MoveError> {
        match self.client.command(&RelayCommand::Reclaim).await {
            Ok(true) => {}
            Ok(false) if self.client.status().end.is_none() => {
                return Err(MoveError::RelayRefused("bring the machine back"));
            }
            Ok(false) | Err(_) => return Ok(false),
        }
        let after = self.client.wait(|s| s.end.is_some());
        let after = tokio::time::timeout(recover::RECLAIM_WITHIN, after).await;
        Ok(after.is_ok_and(|a| a.is_ok_and(|s| s.end == Some(RelayEnd::Reclaimed))))
    }

    async fn command(&self, command: &RelayCommand, what: &'static str) -> Result<(), MoveError> {
        let accepted =
            self.client.command(command).await.map_err(relay("commanding the source relay"))?;
        if accepted { Ok(()) } else { Err(MoveError::RelayRefused(what)) }
    }

    /// Cancels QEMU's migration and lets the machine run on. It is at its source whatever comes of
    /// this: nothing that could run was sent.
    async fn undo(&self) -> Result<(), MoveError> {
        let undone = async {
            let status = self.machine.query_migrate().await?.status;
            if !status.is_final() && status != MigrationStatus::None {
                self.machine.migrate_cancel().await?;
            }
            if self.machine.life().await? != Life::Running {
                self.machine.run().await?;
            }
            Ok::<_, QemuError>(())
        };
        let Err(e) = undone.await else { return Ok(()) };
        if let Some(why) = end_of(self.machine).await {
            return Err(MoveError::Ended { why });
        }
        let SourceState::Cancelling { why } = self.driver.state() else { return Ok(()) };
        let why = format!("{why}; the machine's QEMU does not do what it is told: {}", in_full(&e));
        Err(MoveError::Cancelled { why })
    }

    async fn ended(&mut self, end: SourceEnd) -> Result<(), MoveError> {
        match end {
            SourceEnd::Moved => {}
            SourceEnd::Cancelled { why } => return Err(MoveError::Cancelled { why }),
            SourceEnd::Reclaimed { why } => return Err(MoveError::Reclaimed { why }),
            SourceEnd::Interrupted { why } => return Err(MoveError::Interrupted { why }),
        }
        self.sent.released = Some(now());
        godwit_hold::at("move.released").await;
        self.machine
            .wait_migration("ending the migration", &[MigrationStatus::Completed], EVENT_WITHIN)
            .await
            .map_err(qemu("ending QEMU's migration"))?;
        if self.sent.stopped.is_none() && !self.late {
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
