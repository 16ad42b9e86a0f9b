//! Topologies for the unit tests of the plan.

use std::collections::BTreeMap;

use crate::topology::{Member, Pool, ProxyPeer, Topology};

/// A pool of these nodes, with `proxy` elected; an exposed one is dialled at 198.51.100.10:10262.
pub(super) fn pool(exposed: bool, nodes: &[(&str, [u8; 4])], proxy: &str) -> Pool {
    let members = nodes.iter().map(|(name, ip)| ((*name).to_owned(), Member::new((*ip).into())));
    let dial = exposed.then(|| ("198.51.100.10".to_owned(), 10262));
    let proxies = BTreeMap::from([(proxy.to_owned(), ProxyPeer { dial, port: 10262, ..ProxyPeer::default() })]);
    Pool { exposed, members: members.collect(), proxies, ..Pool::default() }
}

/// One cloud and two edges; x2 and y2 have the same address.
pub(super) fn three_sites() -> Topology {
    let pools = BTreeMap::from([
        ("cloud".to_owned(), pool(true, &[("c1", [10, 0, 0, 1]), ("c2", [10, 0, 0, 2])], "c1")),
        ("edge-x".to_owned(), pool(false, &[("x1", [10, 1, 0, 1]), ("x2", [192, 168, 0, 2])], "x1")),
        ("edge-y".to_owned(), pool(false, &[("y1", [10, 2, 0, 1]), ("y2", [192, 168, 0, 2])], "y1")),
    ]);
    Topology { pools, ..Topology::default() }
}
