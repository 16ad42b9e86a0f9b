//! Gateway nodes that are cut off give way, and no others.

use raven_api::gateway::EndpointType;

use super::build::*;
use super::cases::two_pools;
use crate::gateway::events::changes;

/// Two sites, each with a spare.
fn two_sites() -> Cluster {
    two_pools().gateway(gateway("other", 3)).node(member("other", "o1", "10.3.1.0/24")).node(member("other", "o2", "10.3.2.0/24")).apply(1)
}

#[test]
fn a_gateway_node_that_is_cut_off_gives_way_while_another_site_is_connected() {
    let cluster = two_sites();
    let before = cluster.resource("edge").status.clone();
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let cluster = cluster.link("e1", Some(false), Some(true)).link("o1", Some(true), Some(true)).apply(2);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
    assert_eq!(cluster.elected("edge", EndpointType::Proxy), ["e1"], "what works stays where it is");
    let after = cluster.resource("edge").status.clone().expect("applied");
    let changes = changes(&cluster.0, &"edge".into(), before.as_ref(), &after);
    assert_eq!(changes.len(), 1);
    assert!(changes[0].note.contains("e2 replaces e1 (it is Ready, and cut off from all other pools"), "{changes:?}");
    // Both: then nothing is better than anything else, and the elected stays.
    let cluster = cluster.link("e2", Some(false), None).apply(3);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
}

#[test]
fn where_nobody_is_connected_or_nobody_else_can_be_had_the_elected_stays() {
    // The cloud is down: every site says so.
    let cluster = two_sites().link("e1", Some(false), Some(false)).link("o1", Some(false), Some(false)).apply(2);
    assert_eq!((cluster.tunnel("edge"), cluster.tunnel("other")), (vec!["e1".to_owned()], vec!["o1".to_owned()]));
    // The other end is nobody's witness, and is not judged itself.
    let cluster = cluster.link("c1", Some(true), None).apply(3);
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let cluster = cluster.link("c1", Some(false), None).link("o1", Some(true), None).apply(4);
    assert_eq!(cluster.tunnel("cloud"), ["c1"]);
    // There is no spare.
    let alone = two_sites().without_node("e2").apply(2).link("e1", Some(false), None).link("o1", Some(true), None).apply(3);
    assert_eq!(alone.tunnel("edge"), ["e1"]);
    let down = two_sites().node(down(member("edge", "e2", "10.2.2.0/24"))).link("e1", Some(false), None).link("o1", Some(true), None);
    assert_eq!(down.apply(2).tunnel("edge"), ["e1"]);
}
