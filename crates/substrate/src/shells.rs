//! QEMUs that wait for popular substrates to be activated: with the memory mapped and the device
//! state loaded, their vCPUs standing still.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use godwit_image::Image;
use godwit_qemu::{Accel, NicBackend};
use godwit_types::{Name, SubstrateId};
use tokio::sync::Notify;

use crate::activate::{Place, Shell, nic_inside, prepare};
use crate::async_pool::AsyncPool;
use crate::error::SubstrateError;
use crate::pool::lock;
use crate::ready::Ready;

/// Gives each shell a place to live.
pub type Places = Box<dyn Fn() -> Place + Send + Sync>;

/// Waiting QEMUs. Cheap to clone; all clones are one set. Call [`Shells::close`] at the end: the
/// QEMUs outlive this process otherwise.
#[derive(Clone)]
pub struct Shells {
    inner: Arc<Inner>,
}

struct Inner {
    pool: AsyncPool,
    places: Places,
    lines: Mutex<Lines<(Image, Accel), (Shell, Ready)>>,
    /// How many are being started, whether they are wanted any more or not.
    starting: Mutex<HashMap<SubstrateId, usize>>,
    started: Notify,
}

/// One that is being started for a substrate, until it waits or has ended.
struct Starting<'a> {
    of: &'a Inner,
    id: SubstrateId,
}

impl<'a> Starting<'a> {
    fn begin(of: &'a Inner, id: SubstrateId) -> Self {
        *lock(&of.starting).entry(id).or_default() += 1;
        Self { of, id }
    }
}

impl Drop for Starting<'_> {
    fn drop(&mut self) {
        {
            let mut all = lock(&self.of.starting);
            if let Some(n) = all.get_mut(&self.id) {
                *n -= 1;
                if *n == 0 {
                    all.remove(&self.id);
                }
            }
        }
        self.of.started.notify_waiters();
    }
}

/// The shells of one substrate.
struct Line<W, S> {
    /// Which of all that there were for this substrate.
    serial: u64,
    /// What each is started with.
    with: W,
    wanted: usize,
    starting: usize,
    waiting: Vec<S>,
}

/// All lines, and how many shells of each wait and are being started.
struct Lines<W, S> {
    made: u64,
    by_id: HashMap<SubstrateId, Line<W, S>>,
}

/// A shell that is being started for a line.
struct Turn<W> {
    id: SubstrateId,
    serial: u64,
    with: W,
}

impl<W, S> Default for Lines<W, S> {
    fn default() -> Self {
        Self { made: 0, by_id: HashMap::new() }
    }
}

impl<W: Clone, S> Lines<W, S> {
    /// Keeps `wanted` for `id` from now on; gives what is too many.
    fn keep(&mut self, id: SubstrateId, with: W, wanted: usize) -> Vec<S> {
        let made = &mut self.made;
        let line = self.by_id.entry(id).or_insert_with(|| {
            *made += 1;
            Line { serial: *made, with, wanted, starting: 0, waiting: Vec::new() }
        });
        line.wanted = wanted;
        let at = line.waiting.len().min(wanted);
        line.waiting.split_off(at)
    }

    /// One that is missing and is started from now on.
    fn begin(&mut self, id: SubstrateId) -> Option<Turn<W>> {
        let line = self.by_id.get_mut(&id)?;
        if line.waiting.len() + line.starting >= line.wanted {
            return None;
        }
        line.starting += 1;
        Some(Turn { id, serial: line.serial, with: line.with.clone() })
    }

    /// It has been started, or not. Gives back a shell that nobody wants any more: its line was
    /// dropped meanwhile, also when there is another now, or needs fewer.
    fn end(&mut self, turn: &Turn<W>, started: Option<S>) -> Option<S> {
        match self.by_id.get_mut(&turn.id) {
            Some(line) if line.serial == turn.serial => {
                line.starting -= 1;
                if line.waiting.len() >= line.wanted {
                    return started;
                }
                line.waiting.extend(started);
                None
            }
            _ => started,
        }
    }
}

impl std::fmt::Debug for Shells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shells").field("kept", &self.kept()).finish_non_exhaustive()
    }
}

impl Shells {
    /// None yet; `places` says where each lives.
    #[must_use]
    pub fn new(pool: AsyncPool, places: Places) -> Self {
        let (lines, starting) = (Mutex::default(), Mutex::default());
        Self { inner: Arc::new(Inner { pool, places, lines, starting, started: Notify::new() }) }
    }

    /// The substrates that some are kept for.
    #[must_use]
    pub fn kept(&self) -> Vec<SubstrateId> {
        lock(&self.inner.lines).by_id.keys().copied().collect()
    }

    /// Keeps `wanted` shells for `id` from now on; returns once they wait.
    ///
    /// # Errors
    /// When one cannot be started; those that wait stay.
    pub async fn keep(
        &self,
        id: SubstrateId,
        image: Image,
        accel: Accel,
        wanted: usize,
    ) -> Result<(), SubstrateError> {
        let too_many = lock(&self.inner.lines).keep(id, (image, accel), wanted);
        for (shell, _) in too_many {
            shell.end().await;
        }
        self.fill(id).await
    }

    /// Shells that wait for `id`.
    #[must_use]
    pub fn waiting(&self, id: SubstrateId) -> usize {
        lock(&self.inner.lines).by_id.get(&id).map_or(0, |l| l.waiting.len())
    }

    /// One that waits and is alive.
    pub(crate) fn take(&self, id: SubstrateId) -> Option<(Shell, Ready)> {
        let mut lines = lock(&self.inner.lines);
        let line = lines.by_id.get_mut(&id)?;
        while let Some((shell, ready)) = line.waiting.pop() {
            if shell.machine.process().is_alive() {
                return Some((shell, ready));
            }
            tracing::warn!(run_dir = %shell.place.run_dir.display(), "a waiting QEMU had ended");
        }
        None
    }

    /// Starts what is missing, in the background.
    pub(crate) fn refill(&self, id: SubstrateId) {
        if !lock(&self.inner.lines).by_id.contains_key(&id) {
            return;
        }
        let shells = self.clone();
        tokio::spawn(async move {
            if let Err(error) = shells.fill(id).await {
                tracing::warn!(%id, %error, "no waiting QEMU was started");
            }
        });
    }

    async fn fill(&self, id: SubstrateId) -> Result<(), SubstrateError> {
        loop {
            let Some(turn) = lock(&self.inner.lines).begin(id) else { return Ok(()) };
            let _starting = Starting::begin(&self.inner, id);
            let (image, accel) = &turn.with;
            let (started, failed) = match self.start(id, image, *accel).await {
                Ok(shell) => (Some(shell), None),
                Err(e) => (None, Some(e)),
            };
            let left_over = lock(&self.inner.lines).end(&turn, started);
            if let Some((shell, _)) = left_over {
                shell.end().await;
            }
            if let Some(e) = failed {
                return Err(e);
            }
        }
    }

    async fn start(
        &self,
        id: SubstrateId,
        image: &Image,
        accel: Accel,
    ) -> Result<(Shell, Ready), SubstrateError> {
        let ready = prepare(&self.inner.pool, id, image).await?;
        let place = (self.inner.places)();
        let name = shell_name(&place);
        let nic = nic_inside(&ready.docked.substrate, None, Some(&NicBackend::Isolated))?;
        let shell = Shell::start(&ready, image, place, name, accel, nic).await?;
        let shell = shell.load(&ready).await?;
        Ok((shell, ready))
    }

    /// Keeps none for `id` any more; none is left when this returns.
    pub async fn drop_line(&self, id: SubstrateId) {
        let line = lock(&self.inner.lines).by_id.remove(&id);
        for (shell, _) in line.into_iter().flat_map(|l| l.waiting) {
            shell.end().await;
        }
        loop {
            let started = self.inner.started.notified();
            if !lock(&self.inner.starting).contains_key(&id) {
                return;
            }
            started.await;
        }
    }

    /// Ends all that wait.
    pub async fn close(&self) {
        let ids: Vec<SubstrateId> = lock(&self.inner.lines).by_id.keys().copied().collect();
        for id in ids {
            self.drop_line(id).await;
        }
    }
}

fn shell_name(place: &Place) -> Name {
    let id = place.vm.0.simple().to_string();
    Name::new(&format!("shell-{}", &id[id.len() - 12..]))
        .unwrap_or_else(|_| unreachable!("hex digits make a name"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shell_of_a_line_that_was_dropped_does_not_count_in_the_next() {
        let mut lines = Lines::<(), u32>::default();
        let id = SubstrateId::new();
        assert!(lines.keep(id, (), 1).is_empty());
        let old = lines.begin(id).expect("one is missing");
        assert!(lines.begin(id).is_none());
        lines.by_id.remove(&id);
        lines.keep(id, (), 2);
        // It was started for the line that is gone: with other memory, perhaps.
        assert_eq!(lines.end(&old, Some(7)), Some(7));
        let turns = [lines.begin(id), lines.begin(id)].map(|t| t.expect("two are missing"));
        assert!(lines.begin(id).is_none(), "no more than two");
        assert_eq!(lines.end(&turns[0], Some(8)), None);
        assert_eq!(lines.end(&turns[1], None), None);
        assert!(lines.begin(id).is_some(), "the one that failed is missing");
        assert_eq!(lines.by_id[&id].waiting, [8]);
    }
}
