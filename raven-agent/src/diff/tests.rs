//! Laws of `diff`, checked on a model of the kernel.

use std::{collections::BTreeSet, net::SocketAddr};

use proptest::{collection, option, prelude::*};

use super::*;
use crate::{state::Device, topology::PresharedKey};

/// The kernel's answer to each step. WireGuard moves an allowed IP to the peer that was configured last, and keeps it
/// there until it is removed.
fn apply(mut state: State, steps: &[Step]) -> State {
    for step in steps {
        match step.clone() {
            Step::PutOuter6(k, v) => drop(state.outer6.insert(k, v)),
            Step::PutNode6(k, v) => drop(state.nodes6.insert(k, v)),
            Step::PutNode(k, v) => drop(state.nodes.insert(k, v)),
            Step::PutLocal(k, v) => drop(state.local.insert(k, v)),
            Step::PutRemote(k, v) => drop(state.remote.insert(k, v)),
            Step::PutBarrier(k) => drop(state.barriers.insert(k)),
            Step::DeleteBarrier(k) => drop(state.barriers.remove(&k)),
            Step::PutRoute(k, v) => drop(state.routes.insert(k, v)),
            Step::PutPeer(k, v) => {
                for peer in state.peers.values_mut() {
                    peer.allowed.retain(|p| !v.allowed.contains(p));
                }
                let have = state.peers.remove(&k).unwrap_or_default();
                let allowed = have.allowed.union(&v.allowed).copied().collect();
                state.peers.insert(k, Peer { alive: have.alive, allowed, ..v });
            }
            Step::TakePrefixes(k, surplus) => {
                let peer = state.peers.get_mut(&k).expect("the peer is there");
                assert!(surplus.is_subset(&peer.allowed), "the peer has every prefix that is removed");
                peer.allowed.retain(|p| !surplus.contains(p));
            }
            Step::DeleteRoute(k) => drop(state.routes.remove(&k)),
            Step::DeleteRemote(k) => drop(state.remote.remove(&k)),
            Step::DeletePeer(k) => drop(state.peers.remove(&k)),
            Step::DeleteLocal(k) => drop(state.local.remove(&k)),
            Step::DeleteNode(k) => drop(state.nodes.remove(&k)),
            Step::DeleteNode6(k) => drop(state.nodes6.remove(&k)),
            Step::DeleteOuter6(k) => drop(state.outer6.remove(&k)),
        }
    }
    state
}

fn prefix() -> impl Strategy<Value = IpNet> {
    prop_oneof![
        (0u8..12).prop_map(|n| format!("10.{n}.0.0/16").parse().expect("a prefix")),
        (0u8..12).prop_map(|n| format!("fd00:{n:x}::/64").parse().expect("a prefix")),
    ]
}

fn endpoint() -> impl Strategy<Value = SocketAddr> {
    (1u8..5).prop_map(|n| SocketAddr::from(([198, 51, 100, n], 4500)))
}

fn route() -> impl Strategy<Value = Route> {
    (any::<bool>(), 1280u32..1500).prop_map(|(overlay, mtu)| Route {
        device: if overlay { Device::Overlay } else { Device::Tunnel },
        source: None,
        mtu,
    })
}

fn peers() -> impl Strategy<Value = BTreeMap<PublicKey, Peer>> {
    // A prefix has one peer at most, in the kernel and in a plan.
    let owned = collection::btree_map(prefix(), 0u8..4, 0..12);
    let preshared = option::of((1u8..3).prop_map(|n| PresharedKey([n; 32]))).prop_map(Preshared::from);
    let rest =
        collection::vec((option::of(endpoint()), option::of(Just(15u16)), preshared, any::<bool>(), any::<bool>()), 4);
    (owned, rest).prop_map(|(owned, rest)| {
        let mut peers = BTreeMap::new();
        for (n, (endpoint, keepalive, preshared, alive, exists)) in
            rest.into_iter().enumerate().map(|(n, r)| (n as u8, r))
        {
            let allowed: BTreeSet<_> = owned.iter().filter(|(_, o)| **o == n).map(|(p, _)| *p).collect();
            if exists {
                peers.insert(PublicKey([n; 32]), Peer { endpoint, allowed, keepalive, preshared, alive });
            }
        }
        peers
    })
}

fn state() -> impl Strategy<Value = State> {
    let remote = (0u32..4, 0u8..3).prop_map(|(gateway, n)| Remote { gateway, via: [10, 0, 0, n] });
    let local = (0u8..3).prop_map(|n| Local { node: [10, 0, 0, n] });
    let node = || (0u8..6).prop_map(|n| Ipv4Addr::new(10, 0, 0, n));
    let node6 = || (0u16..6).prop_map(|n| Ipv6Addr::new(0xfd10, 0, 0, 0, 0, 0, 0, n));
    (
        collection::btree_map(prefix(), route(), 0..8),
        peers(),
        collection::btree_map(prefix(), remote, 0..8),
        collection::btree_map(prefix(), local, 0..8),
        collection::btree_map(node(), (0u32..2).prop_map(|flags| Node { flags }), 0..6),
        collection::btree_set(prefix(), 0..8),
        collection::btree_map(node6(), node(), 0..6),
        collection::btree_map(node(), node6(), 0..6),
    )
        .prop_map(|(routes, peers, remote, local, nodes, barriers, nodes6, outer6)| State {
            routes,
            barriers,
            peers,
            remote,
            local,
            nodes,
            nodes6,
            outer6,
        })
}

fn want() -> impl Strategy<Value = State> {
    state().prop_map(|mut s| {
        s.peers.values_mut().for_each(|p| p.alive = false);
        s
    })
}

proptest! {
    #[test]
    fn applying_the_diff_gives_the_desired_state(have in state(), want in want()) {
        let after = apply(have.clone(), &diff(&have, &want));
        prop_assert_eq!(&after.routes, &want.routes);
        prop_assert_eq!(&after.barriers, &want.barriers);
        prop_assert_eq!(&after.remote, &want.remote);
        prop_assert_eq!(&after.local, &want.local);
        prop_assert_eq!(&after.nodes, &want.nodes);
        prop_assert_eq!(&after.nodes6, &want.nodes6);
        prop_assert_eq!(&after.outer6, &want.outer6);
        prop_assert_eq!(after.peers.keys().collect::<Vec<_>>(), want.peers.keys().collect::<Vec<_>>());
        for (key, peer) in &want.peers {
            prop_assert_eq!(&after.peers[key].allowed, &peer.allowed);
            prop_assert_eq!(after.peers[key].keepalive, peer.keepalive);
            prop_assert_eq!(after.peers[key].preshared, peer.preshared);
        }
        prop_assert_eq!(diff(&after, &want), vec![], "a second run has no steps");
    }

    #[test]
    fn equal_states_have_no_steps(want in want()) {
        prop_assert_eq!(diff(&want, &want), vec![]);
    }

    #[test]
    fn live_peer_keeps_its_learned_endpoint(have in state(), want in want()) {
        let after = apply(have.clone(), &diff(&have, &want));
        for (key, peer) in have.peers.iter().filter(|(_, p)| p.alive && p.endpoint.is_some()) {
            if let Some(after) = after.peers.get(key) {
                prop_assert_eq!(after.endpoint, peer.endpoint);
            }
        }
    }

    #[test]
    fn kept_prefix_has_a_peer_at_every_step(have in state(), want in want()) {
        let all = |state: &State| -> BTreeSet<IpNet> { state.peers.values().flat_map(|p| &p.allowed).copied().collect() };
        let stays: BTreeSet<IpNet> = all(&have).intersection(&all(&want)).copied().collect();
        let mut state = have.clone();
        for step in diff(&have, &want) {
            state = apply(state, std::slice::from_ref(&step));
            prop_assert!(stays.is_subset(&all(&state)), "{step:?}");
        }
    }

    #[test]
    fn admission_precedes_routes_and_removal_follows_them(have in state(), want in want()) {
        let steps = diff(&have, &want);
        let place = |wanted: fn(&Step) -> bool| steps.iter().position(wanted);
        let last = |wanted: fn(&Step) -> bool| steps.iter().rposition(wanted);
        let route_added = place(|s| matches!(s, Step::PutRoute(..)));
        let admitted = last(|s| matches!(s, Step::PutNode(..) | Step::PutLocal(..) | Step::PutPeer(..) | Step::PutRemote(..)));
        if let (Some(route), Some(admitted)) = (route_added, admitted) {
            prop_assert!(admitted < route);
        }
        let route_deleted = last(|s| matches!(s, Step::DeleteRoute(_)));
        let removed = place(|s| matches!(s, Step::DeleteRemote(_) | Step::TakePrefixes(..) | Step::DeletePeer(_) | Step::DeleteLocal(_) | Step::DeleteNode(_)));
        if let (Some(route), Some(removed)) = (route_deleted, removed) {
            prop_assert!(route < removed);
        }
    }
}

#[test]
fn silent_peer_is_reset_to_its_configured_endpoint() {
    let key = PublicKey([7; 32]);
    let configured = SocketAddr::from(([198, 51, 100, 1], 4500));
    let stale = SocketAddr::from(([203, 0, 113, 9], 1));
    let with = |endpoint, alive| State {
        peers: BTreeMap::from([(key, Peer { endpoint: Some(endpoint), alive, ..Peer::default() })]),
        ..State::default()
    };
    let want = with(configured, false);
    assert_eq!(diff(&with(stale, true), &want), vec![]);
    let steps = diff(&with(stale, false), &want);
    assert!(matches!(&steps[..], [Step::PutPeer(_, p)] if p.endpoint == Some(configured)), "{steps:?}");
}

#[test]
fn unknown_preshared_key_keeps_the_installed_one() {
    let key = PublicKey([7; 32]);
    let with =
        |preshared| State { peers: BTreeMap::from([(key, Peer { preshared, ..Peer::default() })]), ..State::default() };
    let installed = with(Preshared::Key(PresharedKey([1; 32])));
    assert_eq!(diff(&installed, &with(Preshared::Keep)), vec![]);
    assert_eq!(
        diff(&State::default(), &with(Preshared::Keep)),
        vec![Step::PutPeer(key, Peer::default())],
        "a new peer has none to keep"
    );
    assert_eq!(diff(&installed, &with(Preshared::None)).len(), 1);
}
