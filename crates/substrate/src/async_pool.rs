//! The pool as async tasks have it. Its calls wait for disks, for locks and for each other, and compute
//! hashes on all cores; here each of them gets a thread that may do so, and the task gives way.

use std::collections::BTreeMap;

use godwit_types::{SubstrateId, VmId};
use tokio::task::JoinHandle;

use crate::error::SubstrateError;
use crate::pool::{Pool, Spare};

/// A [`Pool`] whose calls keep no async task's thread. Cheap to clone; all clones are one pool.
#[derive(Debug, Clone)]
pub struct AsyncPool {
    pool: Pool,
}

impl From<Pool> for AsyncPool {
    fn from(pool: Pool) -> Self {
        Self { pool }
    }
}

/// Does `work` on a thread that may wait. It goes on to its end even when the future is dropped.
pub(crate) async fn on_thread<T: Send + 'static>(
    doing: &'static str,
    work: impl FnOnce() -> Result<T, SubstrateError> + Send + 'static,
) -> Result<T, SubstrateError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or(Err(SubstrateError::Worker(doing)))
}

impl AsyncPool {
    /// Does something with the pool on a thread that may wait. It goes on to its end even when the
    /// future is dropped.
    ///
    /// # Errors
    /// Those of `work`; [`SubstrateError::Worker`] when it panics.
    pub async fn run<T: Send + 'static>(
        &self,
        doing: &'static str,
        work: impl FnOnce(&Pool) -> Result<T, SubstrateError> + Send + 'static,
    ) -> Result<T, SubstrateError> {
        let pool = self.pool.clone();
        on_thread(doing, move || work(&pool)).await
    }

    /// The same of something that nobody has to wait for, or that has no error of its own.
    pub fn start<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Pool) -> T + Send + 'static,
    ) -> JoinHandle<T> {
        let pool = self.pool.clone();
        tokio::task::spawn_blocking(move || work(&pool))
    }

    /// For what is on such a thread already.
    pub(crate) const fn inner(&self) -> &Pool {
        &self.pool
    }
}

/// What looks at memory and tmpfs only, under locks that nobody holds while a disk is waited for.
impl AsyncPool {
    /// As [`Pool::note_clone`].
    pub fn note_clone(&self, id: SubstrateId, vm: VmId) {
        self.pool.note_clone(id, vm);
    }

    /// As [`Pool::forget_clone`].
    pub fn forget_clone(&self, vm: VmId) {
        self.pool.forget_clone(vm);
    }

    /// As [`Pool::is_going`].
    pub(crate) fn is_going(&self, id: SubstrateId) -> bool {
        self.pool.is_going(id)
    }

    /// As [`Pool::damaged`].
    #[must_use]
    pub fn damaged(&self, most: usize, chars: usize) -> BTreeMap<SubstrateId, String> {
        self.pool.damaged(most, chars)
    }

    /// As [`Pool::doubt_memory`].
    pub fn doubt_memory(&self, id: SubstrateId) {
        self.pool.doubt_memory(id);
    }

    /// As [`Pool::memory_budget`].
    #[must_use]
    pub fn memory_budget(&self) -> u64 {
        self.pool.memory_budget()
    }

    /// As [`Pool::sealed_bytes`].
    #[must_use]
    pub fn sealed_bytes(&self) -> (u64, u64) {
        self.pool.sealed_bytes()
    }

    /// As [`Pool::over_budget`].
    #[must_use]
    pub fn over_budget(&self) -> u64 {
        self.pool.over_budget()
    }

    /// As [`Pool::gives_way_first`].
    pub fn gives_way_first(&self, spare: Spare) {
        self.pool.gives_way_first(spare);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use godwit_store::{Owner, Store, StoreOptions};

    use super::*;
    use crate::pool::PoolDirs;

    fn pool(dir: &std::path::Path) -> AsyncPool {
        let options = StoreOptions { reserve_bytes: 0, ..StoreOptions::default() };
        let store = Store::open(&dir.join("store"), options).expect("store");
        let dirs = PoolDirs { substrates: dir.join("substrates"), memory: dir.join("memory") };
        Pool::open(dirs, store, u64::MAX).expect("pool").into()
    }

    /// On the one thread that all async tasks have here.
    #[tokio::test]
    async fn while_the_pool_is_waited_for_other_tasks_run() {
        let dir = tempfile::tempdir().expect("dir");
        let pool = pool(dir.path());
        let (go_on, wait) = std::sync::mpsc::channel();
        let one = pool.clone();
        let busy = tokio::spawn(async move {
            let work = move |pool: &Pool| {
                wait.recv_timeout(Duration::from_secs(60)).expect("another task ran meanwhile");
                Ok(pool.store().put(Owner([7; 16]), b"a unit")?)
            };
            one.run("writing", work).await
        });
        let asked = pool.run("listing", Pool::list).await.expect("listed");
        assert!(asked.is_empty());
        go_on.send(()).expect("it waits");
        let hash = busy.await.expect("no panic").expect("stored");
        let units = pool.run("asking", move |pool| Ok(pool.store().contains_many(&[hash])?)).await;
        assert_eq!(units.expect("asked"), [true]);
    }

    #[tokio::test]
    async fn a_job_that_panics_is_an_error_that_names_it() {
        let dir = tempfile::tempdir().expect("dir");
        let pool = pool(dir.path());
        let failed = pool.run("listing substrates", |_| -> Result<(), _> { panic!("a bug") }).await;
        let error = failed.expect_err("it panicked").to_string();
        assert!(error.contains("listing substrates"), "{error}");
        assert!(pool.run("listing", Pool::list).await.is_ok(), "the pool goes on");
    }
}
