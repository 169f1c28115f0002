//! What is seen of the machines of a site.

use std::path::{Path, PathBuf};
use std::time::Duration;

use godwit_qemu::{Life, Process};
use godwit_types::{Fault, VmId, VmState};

use super::allowed::{Action, First};
use super::course::{End, Migration};
use super::dirs::remove_file;
use super::entry::Entry;
use super::faults::into_fault;
use super::owner::{Ask, Owned, Owner};
use super::record::{DesiredState, MachineRecord};
use super::room::Room;
use super::table::Machines;
use crate::MachineStatus;

impl Machines {
    /// All of them. One that a full disk stopped runs on once there is room.
    pub(super) async fn list(&self, room: &Room) -> Vec<MachineStatus> {
        let owners = self.all().await;
        // Side by side: one whose QEMU answers late keeps nobody waiting for the others.
        let looks = owners.iter().map(|owner| self.look_at(room, owner));
        futures::future::join_all(looks).await.into_iter().flatten().collect()
    }

    /// One of them.
    pub(super) async fn status(&self, room: &Room, vm: VmId) -> Result<MachineStatus, Fault> {
        let owner = self.owner(vm).await?;
        self.look_at(room, &owner).await.ok_or_else(|| self.not_here(vm))
    }

    /// What a machine is now, as it is published and by its QEMU's word; `None` for one that is
    /// gone. Its owner is told what was found, and not waited for.
    pub(super) async fn look_at(&self, room: &Room, owner: &Owner) -> Option<MachineStatus> {
        let mut e = owner.now();
        if e.record.desired == DesiredState::Gone {
            return None;
        }
        if let Some(state) = e.state(&self.site).changing() {
            return Some(status_as(&e.record, state));
        }
        let mut life = life_of(&e).await;
        if life == Some(Life::Stalled) {
            let full = room.check_disk(0).is_err().then(|| self.dirs.data.display().to_string());
            let wake = owner.ask(Wake { full });
            // One whose owner is busy is woken by whoever looks next.
            let _ = tokio::time::timeout(WAKE_WITHIN, wake).await;
            e = owner.now();
            life = life_of(&e).await;
        }
        if life == Some(Life::Exited)
            && let Some(process) = found_exited(&mut e).await
        {
            owner.notify(Exited { process, memory: self.dirs.vm_memory(e.record.vm) });
        }
        let state = e.state(&self.site).asked(life).vm_state();
        Some(status_as(&e.record, state))
    }

    /// The end of a machine's console log, also of one that has ended.
    pub(super) async fn console_log(&self, vm: VmId, max: usize) -> Result<Vec<u8>, Fault> {
        let e = self.owner(vm).await?.now();
        let _ = e.state(&self.site).allows(Action::Log)?;
        if let Some(m) = &e.machine {
            return m.console_tail(max).map_err(into_fault);
        }
        let path = godwit_qemu::RunPaths::of(&self.dirs.vm_run(e.record.vm)).console_log;
        tail(&path, max)
    }
}

fn tail(path: &Path, max: usize) -> Result<Vec<u8>, Fault> {
    use std::io::{Read, Seek, SeekFrom};
    let fail = |e: std::io::Error| Fault::not_found(format!("reading {}: {e}", path.display()));
    let mut file = std::fs::File::open(path).map_err(fail)?;
    let len = file.metadata().map_err(fail)?.len();
    file.seek(SeekFrom::Start(len.saturating_sub(max as u64))).map_err(fail)?;
    let mut out = Vec::new();
    file.take(max as u64).read_to_end(&mut out).map_err(fail)?;
    Ok(out)
}

/// A machine that a full disk stopped runs on, once there is room again.
struct Wake {
    /// Where there is no room yet.
    full: Option<String>,
}

impl Ask for Wake {
    type Reply = ();
    const STEP: &'static str = "owner.wake";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        let Some(m) = e.machine.clone() else { return Ok(()) };
        if let Some(at) = self.full {
            let words = format!("its guest stands still: there is no room for its disk at {at}");
            if e.record.reason.as_ref() != Some(&words) {
                tracing::warn!(vm = %e.record.name, "{words}");
                e.record.reason = Some(words);
            }
            return Ok(());
        }
        if life_of(e).await != Some(Life::Stalled) {
            return Ok(());
        }
        match m.run().await {
            Ok(()) => {
                tracing::info!(vm = %e.record.name, "there is room for its disk again: it runs on");
                e.record.reason = None;
            }
            Err(error) => tracing::warn!(vm = %e.record.name, %error, "it does not run on"),
        }
        Ok(())
    }
}

/// Whoever looked at a machine found that its QEMU has ended.
struct Exited {
    process: Process,
    /// The file that its memory is in.
    memory: PathBuf,
}

impl Ask for Exited {
    type Reply = ();
    const STEP: &'static str = "owner.exited";

    async fn answer(self, e: &mut Owned, _: First) -> Result<(), Fault> {
        // Another one may run by now.
        if e.machine.as_ref().is_none_or(|m| *m.process() != self.process) {
            return Ok(());
        }
        let desired = e.record.desired;
        let _ = found_exited(e).await;
        if e.record.desired != desired {
            tracing::info!(vm = %e.record.name, "its guest powered itself off");
            let kept = e.save();
            if let Err(f) = kept.and_then(|()| remove_file(&self.memory)) {
                tracing::warn!(error = %f, "what it left behind");
            }
        }
        Ok(())
    }
}

/// What a machine is once its QEMU has ended; gives which one that was.
pub(super) async fn found_exited(e: &mut Entry) -> Option<Process> {
    let m = e.machine.take()?;
    e.saw_end = true;
    if e.record.desired == DesiredState::Running {
        if m.has_powered_off() {
            e.record.desired = DesiredState::Stopped;
            e.record.reason = None;
        } else {
            e.record.reason = Some(m.exited().await.brief());
        }
    }
    Some(m.process().clone())
}

/// How long QEMU may take to say how it is. One whose main loop waits for a page says nothing.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);
/// How long one that a full disk stopped is waited for to run on.
const WAKE_WITHIN: Duration = Duration::from_secs(1);

/// In which life a machine's QEMU is, if it has one.
pub(super) async fn life_of(e: &Entry) -> Option<Life> {
    let m = e.machine.as_ref()?;
    // Nobody takes a source that stands still and is silent for one that runs.
    let leaves = e.record.migration.as_ref().is_some_and(|m| m.end() == End::Source);
    let silent = if leaves { Life::Leaving } else { Life::Running };
    match tokio::time::timeout(ANSWER_WITHIN, m.life()).await {
        Ok(Ok(life)) => Some(life),
        Ok(Err(_)) | Err(_) => Some(silent),
    }
}

fn status_as(r: &MachineRecord, state: VmState) -> MachineStatus {
    MachineStatus {
        vm: r.vm,
        name: r.name.clone(),
        generation: r.generation,
        warrant: r.warrant.clone(),
        state,
        image: r.image.clone(),
        arch: r.arch,
        memory: r.memory,
        vcpus: r.vcpus,
        reason: match (
            state,
            r.migration.as_ref().and_then(Migration::abandoned).or(r.reason.as_ref()).cloned(),
        ) {
            (VmState::Failed, None) => Some("QEMU is gone".into()),
            (VmState::Failed, reason) => reason,
            _ => None,
        },
        activate: None,
    }
}
