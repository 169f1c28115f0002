//! QEMUs that wait for popular substrates to be activated: with the memory mapped and the device
//! state loaded, their vCPUs standing still.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use godwit_image::Image;
use godwit_qemu::Accel;
use godwit_types::{Name, SubstrateId};
use tokio::sync::Notify;

use crate::activate::{Place, Shell, prepare};
use crate::error::SubstrateError;
use crate::pool::{Pool, lock};
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
    pool: Pool,
    places: Places,
    lines: Mutex<HashMap<SubstrateId, Line>>,
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
struct Line {
    image: Image,
    accel: Accel,
    wanted: usize,
    starting: usize,
    waiting: Vec<(Shell, Ready)>,
}

impl std::fmt::Debug for Shells {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Shells").field("kept", &self.kept()).finish_non_exhaustive()
    }
}

impl Shells {
    /// None yet; `places` says where each lives.
    #[must_use]
    pub fn new(pool: Pool, places: Places) -> Self {
        let (lines, starting) = (Mutex::default(), Mutex::default());
        Self { inner: Arc::new(Inner { pool, places, lines, starting, started: Notify::new() }) }
    }

    /// The substrates that some are kept for.
    #[must_use]
    pub fn kept(&self) -> Vec<SubstrateId> {
        lock(&self.inner.lines).keys().copied().collect()
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
        let too_many = {
            let mut lines = lock(&self.inner.lines);
            let line = lines.entry(id).or_insert_with(|| Line {
                image,
                accel,
                wanted,
                starting: 0,
                waiting: Vec::new(),
            });
            line.wanted = wanted;
            let at = line.waiting.len().min(wanted);
            line.waiting.split_off(at)
        };
        for (shell, _) in too_many {
            shell.end().await;
        }
        self.fill(id).await
    }

    /// Shells that wait for `id`.
    #[must_use]
    pub fn waiting(&self, id: SubstrateId) -> usize {
        lock(&self.inner.lines).get(&id).map_or(0, |l| l.waiting.len())
    }

    /// One that waits and is alive.
    pub(crate) fn take(&self, id: SubstrateId) -> Option<(Shell, Ready)> {
        let mut lines = lock(&self.inner.lines);
        let line = lines.get_mut(&id)?;
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
        if !lock(&self.inner.lines).contains_key(&id) {
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
            let (image, accel) = {
                let mut lines = lock(&self.inner.lines);
                match lines.get_mut(&id) {
                    Some(l) if l.waiting.len() + l.starting < l.wanted => {
                        l.starting += 1;
                        (l.image.clone(), l.accel)
                    }
                    _ => return Ok(()),
                }
            };
            let _starting = Starting::begin(&self.inner, id);
            let started = self.start(id, &image, accel).await;
            let left_over = {
                let mut lines = lock(&self.inner.lines);
                match lines.get_mut(&id) {
                    Some(l) => {
                        l.starting -= 1;
                        let shell = started?;
                        if l.waiting.len() < l.wanted {
                            l.waiting.push(shell);
                            None
                        } else {
                            Some(shell)
                        }
                    }
                    None => started.ok(),
                }
            };
            if let Some((shell, _)) = left_over {
                shell.end().await;
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
        let shell = Shell::start(&ready, image, place, name, accel).await?;
        let shell = shell.load(&ready).await?;
        Ok((shell, ready))
    }

    /// Keeps none for `id` any more; none is left when this returns.
    pub async fn drop_line(&self, id: SubstrateId) {
        let line = lock(&self.inner.lines).remove(&id);
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
        let ids: Vec<SubstrateId> = lock(&self.inner.lines).keys().copied().collect();
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
