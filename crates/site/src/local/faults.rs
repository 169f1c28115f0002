//! Failures of the rooms below as this one passes them on.

use godwit_types::Fault;

/// The failure of a room below.
pub(super) fn into_fault<E: godwit_types::CodedError>(e: E) -> Fault {
    Fault::of(&e)
}

/// Why a job on another thread has no result.
pub(super) fn join_error(e: tokio::task::JoinError) -> Fault {
    Fault::internal(format!("a job ended by a panic: {e}"))
}
