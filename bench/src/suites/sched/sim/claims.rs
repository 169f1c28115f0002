//! What the thesis says, figure by figure.

use godwit_sched::policy::Policy;
use godwit_sched::sim::workload::Workload;

/// One comparison that the thesis makes: by how much SBCO is better than `against`, percent of the
/// run time of `against` (of its throughput for SPECjbb).
#[derive(Debug, Clone, Copy)]
pub(super) struct Claim {
    pub(super) figure: &'static str,
    pub(super) workload: Workload,
    pub(super) queue: usize,
    pub(super) against: Policy,
    /// The thesis' words.
    pub(super) thesis: &'static str,
}

const fn claim(
    figure: &'static str,
    workload: Workload,
    queue: usize,
    against: Policy,
    thesis: &'static str,
) -> Claim {
    Claim { figure, workload, queue, against, thesis }
}

use Workload as W;

/// What section 4.6 gives in figures of run time and throughput.
pub(super) const CLAIMS: &[Claim] = &[
    claim("4.6", W::Kernbench, 4, Policy::DFT, "14 %"),
    claim("4.6", W::Kernbench, 4, Policy::BAL, "6 %"),
    claim("4.6", W::Kernbench, 4, Policy::PROCCO, "better"),
    claim("4.6", W::Kernbench, 4, Policy::CPUCO, "much better"),
    claim("4.8", W::Dedup, 8, Policy::DFT, "68 %"),
    claim("4.8", W::Dedup, 8, Policy::BAL, "7 %"),
    claim("4.8", W::Dedup, 8, Policy::PROCCO, "better"),
    claim("4.8", W::Streamcluster, 8, Policy::DFT, "52 %"),
    claim("4.8", W::Streamcluster, 8, Policy::BAL, "9 %"),
    claim("4.8", W::Streamcluster, 8, Policy::PROCCO, "better"),
    claim("4.8", W::X264, 8, Policy::BAL, "about 0"),
    claim("4.8", W::Facesim, 8, Policy::BAL, "about 0"),
    claim("4.8", W::Ferret, 8, Policy::BAL, "about 0"),
    claim("4.9", W::Dedup, 12, Policy::DFT, "70 %"),
    claim("4.9", W::Streamcluster, 12, Policy::DFT, "better"),
    claim("4.9", W::X264, 12, Policy::DFT, "better"),
    claim("4.9", W::Facesim, 12, Policy::DFT, "better"),
    claim("4.9", W::Ferret, 12, Policy::DFT, "better"),
    claim("4.11", W::Dedup, 24, Policy::DFT, "61 %"),
    // Three other machines make a queue of 4, and one of 2.
    claim("4.8", W::Dedup, 2, Policy::DFT, "-"),
    claim("4.8", W::Dedup, 4, Policy::DFT, "68 % (8)"),
    claim("4.8", W::Streamcluster, 2, Policy::DFT, "-"),
    claim("4.8", W::Streamcluster, 2, Policy::BAL, "-"),
    claim("4.8", W::Streamcluster, 4, Policy::DFT, "52 % (8)"),
    claim("4.8", W::Streamcluster, 4, Policy::BAL, "9 % (8)"),
    // Other steps in which memory is mapped.
    claim("4.8", W::Dedup16, 8, Policy::DFT, "68 %"),
    claim("4.8", W::Dedup4, 4, Policy::DFT, "68 % (8)"),
    claim("4.8", W::Dedup4, 8, Policy::DFT, "68 %"),
    claim("4.8", W::Dedup4, 8, Policy::BAL, "7 %"),
    claim("4.9", W::Dedup4, 12, Policy::DFT, "70 %"),
];

/// Run queues of figure 4.11; the thesis gives no numbers for its steps.
pub(super) const SCALING: [usize; 6] = [6, 8, 10, 12, 18, 24];
/// What figure 4.11 is simulated with.
pub(super) const SCALED: [Workload; 3] = [W::Dedup, W::Streamcluster, W::Ferret];
/// Disturbing machines of figure 4.10.
pub(super) const DISTURBING: [usize; 5] = [1, 2, 3, 4, 5];
