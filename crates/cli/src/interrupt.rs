//! Ctrl-C, for commands that leave something to say when they are interrupted.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::failure::{Failure, Result};

/// Ctrl-C (SIGINT) is listened for from [`Interrupt::listen`] on, so that it never ends the program in
/// between. A command does so before it shows anything: `tokio::signal::ctrl_c` only listens once it is
/// polled, and whoever saw the first output may be faster.
pub(crate) struct Interrupt(Signal);

impl Interrupt {
    /// # Errors
    /// When the kernel takes no handler.
    pub(crate) fn listen() -> Result<Self> {
        signal(SignalKind::interrupt())
            .map(Self)
            .map_err(|e| Failure::internal(format!("listening for signals: {e}")))
    }

    /// Waits for the next Ctrl-C, one that came since `listen` included.
    pub(crate) async fn pressed(&mut self) {
        // There is always another: the listener lives as long as the runtime.
        let _ = self.0.recv().await;
    }
}
