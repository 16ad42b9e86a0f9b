//! Gateway nodes that are cut off are replaced.

use raven_api::gateway::EndpointType;

use super::build::*;
use super::cases::two_pools;
use crate::gateway::events::changes;

/// Two sites, each with a second node.
fn two_sites() -> Cluster {
    two_pools()
        .gateway(gateway("other", 3))
        .node(member("other", "o1", "10.3.1.0/24"))
        .node(member("other", "o2", "10.3.2.0/24"))
        .apply(1)
}

#[test]
fn cut_off_node_is_replaced_while_another_site_is_connected() {
    let cluster = two_sites();
    let before = cluster.resource("edge").status.clone();
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let cluster = cluster.link("e1", Some(false), Some(true)).link("o1", Some(true), Some(true)).apply(2);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
    assert_eq!(cluster.elected("edge", EndpointType::Proxy), ["e1"], "the proxy is connected and stays");
    let after = cluster.resource("edge").status.clone().expect("applied");
    let changes = changes(&cluster.0, &"edge".into(), before.as_ref(), &after);
    assert_eq!(changes.len(), 1);
    assert!(changes[0].note.contains("e2 replaces e1 (it is Ready but cut off from all other pools"), "{changes:?}");
    // Both nodes are cut off: the elected node stays.
    let cluster = cluster.link("e2", Some(false), None).apply(3);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
}

#[test]
fn cut_off_node_stays_without_a_connected_site_or_another_candidate() {
    // The cloud is down: every site reports it.
    let cluster = two_sites().link("e1", Some(false), Some(false)).link("o1", Some(false), Some(false)).apply(2);
    assert_eq!((cluster.tunnel("edge"), cluster.tunnel("other")), (vec!["e1".to_owned()], vec!["o1".to_owned()]));
    // A report of the cloud's node neither counts as a connected site nor affects that node.
    let cluster = cluster.link("c1", Some(true), None).apply(3);
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let cluster = cluster.link("c1", Some(false), None).link("o1", Some(true), None).apply(4);
    assert_eq!(cluster.tunnel("cloud"), ["c1"]);
    // No second candidate.
    let alone =
        two_sites().without_node("e2").apply(2).link("e1", Some(false), None).link("o1", Some(true), None).apply(3);
    assert_eq!(alone.tunnel("edge"), ["e1"]);
    let down = two_sites().node(down(member("edge", "e2", "10.2.2.0/24"))).link("e1", Some(false), None).link(
        "o1",
        Some(true),
        None,
    );
    assert_eq!(down.apply(2).tunnel("edge"), ["e1"]);
}
