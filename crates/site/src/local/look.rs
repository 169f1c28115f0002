//! What is seen of the machines of a site.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use godwit_qemu::Life;
use godwit_types::{Fault, Name, VmId, VmState};
use tokio::sync::Mutex;

use super::allowed::Action;
use super::course::{End, Migration};
use super::entry::Entry;
use super::machines::{LOOK_EVERY, into_fault, remove_file};
use super::record::{DesiredState, MachineRecord, Unfinished};
use super::room::Room;
use super::table::Machines;
use crate::MachineStatus;

impl Machines {
    /// All of them. One that a full disk stopped runs on once there is room.
    pub(super) async fn list(&self, room: &Room) -> Vec<MachineStatus> {
        let entries = self.now().await;
        // Side by side: one that answers late keeps nobody waiting for the others.
        let looks = entries.into_iter().map(|(vm, entry)| self.look_at(room, vm, entry));
        futures::future::join_all(looks).await.into_iter().flatten().collect()
    }

    /// One of them.
    pub(super) async fn status(&self, room: &Room, vm: VmId) -> Result<MachineStatus, Fault> {
        let entry = self.entry(vm).await?;
        self.look_at(room, vm, entry).await.ok_or_else(|| self.not_here(vm))
    }

    /// What a machine is now; `None` for one that is gone.
    async fn look_at(
        &self,
        room: &Room,
        vm: VmId,
        entry: Arc<Mutex<Entry>>,
    ) -> Option<MachineStatus> {
        // One that is being changed answers with what is known of it without waiting.
        let Ok(mut e) = tokio::time::timeout(LOOK_EVERY, entry.lock()).await else {
            return self.busy_status(vm);
        };
        if e.record.desired == DesiredState::Gone {
            return None;
        }
        if let Some(state) = e.state(&self.site).changing() {
            return Some(status_as(&e.record, state));
        }
        let mut life = life_of(&e).await;
        if life == Some(Life::Stalled) {
            self.wake_stalled(room, &mut e).await;
            life = life_of(&e).await;
        }
        let meant = e.record.desired;
        let status = status_of(&self.site, &mut e, life).await;
        if e.record.desired != meant {
            tracing::info!(vm = %e.record.name, "its guest powered itself off");
            let kept = e.record.save(&self.dirs.vm(vm));
            if let Err(f) = kept.and_then(|()| remove_file(&self.dirs.vm_memory(vm))) {
                tracing::warn!(error = %f, "what it left behind");
            }
        }
        Some(status)
    }

    /// Lets a machine run on that a full disk stopped, once there is room again.
    async fn wake_stalled(&self, room: &Room, e: &mut Entry) {
        let Some(m) = &e.machine else { return };
        if room.check_disk(0).is_err() {
            let words = format!(
                "its guest stands still: there is no room for its disk at {}",
                self.dirs.data.display()
            );
            if e.record.reason.as_ref() != Some(&words) {
                tracing::warn!(vm = %e.record.name, "{words}");
                e.record.reason = Some(words);
            }
            return;
        }
        match m.run().await {
            Ok(()) => {
                tracing::info!(vm = %e.record.name, "there is room for its disk again: it runs on");
                e.record.reason = None;
            }
            Err(error) => tracing::warn!(vm = %e.record.name, %error, "it does not run on"),
        }
    }

    /// A machine that a job has at this moment, as its record has it: present, and not settled.
    fn busy_status(&self, vm: VmId) -> Option<MachineStatus> {
        let r = MachineRecord::load(&self.dirs.vm(vm)).ok().flatten()?;
        let docking = matches!(r.unfinished, Some(Unfinished::Docking { .. }));
        let state = if docking { VmState::Docking } else { VmState::Starting };
        (r.desired != DesiredState::Gone).then(|| status_as(&r, state))
    }

    /// The end of a machine's console log, also of one that has ended.
    pub(super) async fn console_log(&self, vm: VmId, max: usize) -> Result<Vec<u8>, Fault> {
        let entry = self.entry(vm).await?;
        let e = entry.lock().await;
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

/// How long QEMU may take to say how it is. One whose main loop waits for a page says nothing.
const ANSWER_WITHIN: Duration = Duration::from_secs(2);

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

/// What a machine is, by QEMU's word.
pub(super) async fn status_of(site: &Name, e: &mut Entry, life: Option<Life>) -> MachineStatus {
    if life == Some(Life::Exited)
        && let Some(m) = e.machine.take()
        && e.record.desired == DesiredState::Running
    {
        if m.has_powered_off() {
            e.record.desired = DesiredState::Stopped;
            e.record.reason = None;
        } else {
            e.record.reason = Some(m.exited().await.brief());
        }
    }
    let state = e.state(site).asked(life).vm_state();
    status_as(&e.record, state)
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
