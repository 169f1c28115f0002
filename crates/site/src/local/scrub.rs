//! What is stored, read again in the background: a bit that a disk or a memory turned over by itself
//! changes no time stamp, so nothing else would see it.

use std::sync::Arc;
use std::time::Duration;

use godwit_substrate::Pool;
use godwit_types::chain;

use super::LocalSite;

/// When a daemon that has started does it first: not while it is being used for the first time.
const FIRST: Duration = Duration::from_secs(600);
/// How long after the end of one the next begins.
const PAUSE: Duration = Duration::from_secs(24 * 3600);
/// The nice value of the threads that do it.
const NICE: i32 = 15;

/// Checks pool and images from time to time, or `every` so often, for as long as the site is there.
pub(super) fn start(site: &Arc<LocalSite>, every: Option<Duration>) {
    let site = Arc::downgrade(site);
    tokio::spawn(async move {
        let mut pause = every.unwrap_or(FIRST);
        loop {
            tokio::time::sleep(pause).await;
            pause = every.unwrap_or(PAUSE);
            let Some(site) = site.upgrade() else { return };
            let (pool, images) =
                (site.parts.substrates.pool.clone(), site.parts.images.cache().clone());
            drop(site);
            let work = move |pool: &Pool| {
                let threads =
                    std::thread::available_parallelism().map_or(1, |n| n.get().div_ceil(2));
                let nice = |_| {
                    // Of this thread alone. Without it the work is only less polite.
                    let _ = rustix::process::setpriority_process(None, NICE);
                };
                let workers = rayon::ThreadPoolBuilder::new()
                    .num_threads(threads)
                    .start_handler(nice)
                    .build();
                let done = workers.map(|workers| workers.install(|| scrub(pool, &images)));
                if let Err(error) = done {
                    tracing::warn!(%error, "nothing was checked in the background");
                }
            };
            if let Err(error) = pool.start(work).await {
                tracing::error!(%error, "checking in the background");
            }
        }
    });
}

fn scrub(pool: &Pool, images: &godwit_image::ImageCache) {
    match pool.check() {
        Ok(report) if report.is_clean() => {
            tracing::info!(
                units = report.store.units,
                substrates = report.substrates,
                "the pool is sound"
            );
        }
        Ok(report) => {
            if let Some(why) = &report.store.index {
                tracing::error!("the index of the pool's store: {why}");
            }
            for damaged in &report.store.damaged {
                tracing::error!("{damaged}");
            }
            for (id, why) in &report.broken {
                tracing::error!(%id, "{why}");
            }
        }
        Err(error) => tracing::error!(error = chain(&error), "the pool was not checked"),
    }
    let list = images.list().unwrap_or_else(|error| {
        tracing::error!(error = chain(&error), "images were not checked");
        Vec::new()
    });
    for image in list {
        if let Err(error) = images.scrub(&image) {
            tracing::error!(image = %image.name, error = chain(&error), "an image is damaged");
        }
    }
}
