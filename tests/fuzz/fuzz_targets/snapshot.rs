//! Topologies from the API server or from the snapshot on disk: every input results in a plan, planning is
//! deterministic, and no prefix belongs to two pools.
#![no_main]

use std::collections::BTreeSet;

use libfuzzer_sys::fuzz_target;
use raven_agent::{
    plan::{Me, plan},
    topology::{Inputs, build},
};

fuzz_target!(|bytes: &[u8]| {
    let Ok(inputs) = serde_json::from_slice::<Inputs>(bytes) else { return };
    let topology = build(&inputs);
    let mut taken = BTreeSet::new();
    for prefix in topology.pools.values().flat_map(|pool| pool.members.values()).flat_map(|member| &member.prefixes) {
        assert!(taken.insert(*prefix), "{prefix} belongs to two nodes");
    }
    for node in topology.pools.values().flat_map(|pool| pool.members.keys()).take(4) {
        let me = Me { node: node.clone(), ..Me::default() };
        let first = plan(&topology, &me);
        assert_eq!(first, plan(&topology, &me));
        for prefix in first.state.routes.keys() {
            assert!(first.state.remote.contains_key(prefix), "route without a map entry: {prefix}");
        }
    }
});
