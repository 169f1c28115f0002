//! The networks of a cloud that ends.

use std::io::Write;
use std::path::PathBuf;

/// Removes the networks of the sites whose things are in `sites`: they outlive machines, and daemons whose
/// end nobody told them of.
pub(crate) fn end_networks(sites: &[PathBuf]) {
    // A thread of its own: this one may be a runtime's.
    let ended = std::thread::scope(|s| s.spawn(|| end_each(sites)).join());
    if !matches!(ended, Ok(Ok(()))) {
        // Where a test's own words go.
        let _ = std::io::stderr().write_all(format!("networks stay: {ended:?}\n").as_bytes());
    }
}

fn end_each(sites: &[PathBuf]) -> Result<(), String> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|e| e.to_string())?;
    for data in sites {
        let networks = godwit_net::Networks::of(data);
        let troubles = runtime.block_on(networks.apply(&[], godwit_net::Rest::Goes));
        if !troubles.is_empty() {
            return Err(format!("{troubles:?}"));
        }
    }
    Ok(())
}
