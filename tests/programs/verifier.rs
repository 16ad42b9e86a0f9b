//! What the programs cost when an agent loads them.

use raven_agent::bpf::Hook;
use raven_tests::require_root;

use crate::{dataplane::Dataplane, topology};

/// Limit of instructions that the verifier follows per program; 33,700 are needed (Linux 6.18), most of them for the
/// rounds of the guard's MAC; in `uplink_ingress` it follows them for each address family. A program with branches that it
/// cannot prune needs a hundred times as many, which adds seconds to each agent's start on a small node.
const LIMIT: u32 = 40_000;

#[test]
fn programs_are_cheap_to_verify() {
    require_root!();
    let dataplane = Dataplane::load(topology::gateway());
    for hook in Hook::ALL {
        let Some(verified) = dataplane.verified_instructions(hook) else {
            eprintln!("SKIPPED: {}: kernels before 5.16 do not report the number of instructions", hook.program());
            continue;
        };
        assert!(verified > 0 && verified < LIMIT, "{}: {verified} instructions", hook.program());
    }
}
