//! The pools' prefixes: what the nodes' pods have, and what a Gateway's annotation adds, each prefix in one pool only.
//!
//! Receives drafts in the order of seniority with their nodes elected; fills in each node's subnets and notes what was refused. A refused
//! prefix is in no status, so no dataplane ever sees it.
//!
//! Which prefixes a node's pods have is the CNI's to say:
//! - Calico's IPAM gives out blocks and says so in BlockAffinities. A node that has blocks has these and not its podCIDRs; a podCIDR
//!   that overlaps anybody's block is Calico's to give out, and is nobody's as a whole.
//! - flannel asks Kubernetes: its subnet is `Node.spec.podCIDRs` (`pkg/subnet/kube/kube.go`, AcquireLease: without a podCIDR it does not
//!   start). Its annotations `flannel.alpha.coreos.com/…` hold the backend's type, MAC and VNI, and the address by which flannel's own
//!   peers reach the node, which need not be one of this pool's LAN: no subnet, and nothing that we should use instead of the InternalIP.
//!   (With its older etcd store the subnets are nowhere in the API: there the annotation of the Gateway names them.)
//! - All others: `Node.spec.podCIDRs`.

use std::collections::BTreeMap;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;
use raven_api::ANNOTATION_EXTRA_CIDRS;

use super::NodeName;
use super::claims::{Claims, Conflict, Kind, Owner};
use super::guard::{self, Guard};
use super::inputs::{BadPrefix, Inputs, NodeFacts, parse_prefix};
use super::status::{Draft, Notice, Refusal};

/// Gives every node of every draft its subnets.
pub fn assign<'a>(inputs: &'a Inputs, drafts: &mut [Draft<'a>]) {
    let guard = Guard::new(inputs, drafts);
    let blocks = Blocks::new(inputs);
    let mut claims = Claims::default();
    drafts.iter_mut().for_each(|draft| pod_prefixes(draft, &blocks, &guard, &mut claims));
    drafts.iter_mut().for_each(|draft| addresses(draft, &claims));
    // Extra prefixes come after everybody's pod prefixes, not in turn: those are facts that Kubernetes made, these are a person's wish,
    // and an annotation like 10.0.0.0/8 on an old Gateway must not take younger pools off the network.
    drafts.iter_mut().for_each(|draft| extra_prefixes(draft, &guard, &mut claims));
}

// Calico's blocks, once through for the whole cluster.
struct Blocks<'a> {
    by_node: BTreeMap<&'a NodeName, Vec<&'a Result<IpNet, BadPrefix>>>,
    all: JointPrefixMap<IpNet, ()>,
}

impl<'a> Blocks<'a> {
    fn new(inputs: &'a Inputs) -> Self {
        let mut blocks = Self { by_node: BTreeMap::new(), all: JointPrefixMap::new() };
        for block in inputs.blocks.values() {
            blocks.by_node.entry(&block.node).or_default().push(&block.prefix);
            if let Ok(prefix) = block.prefix {
                blocks.all.insert(prefix, ());
            }
        }
        // By prefix, IPv4 first, as podCIDRs are: names of blocks sort otherwise.
        blocks.by_node.values_mut().for_each(|list| list.sort_by_key(|prefix| prefix.as_ref().ok().copied()));
        blocks
    }

    // What a node's pods have, and what it is called.
    fn of(&self, node: &'a NodeFacts) -> (&'static str, Vec<&'a Result<IpNet, BadPrefix>>) {
        match self.by_node.get(&node.name) {
            Some(blocks) => ("Calico block", blocks.clone()),
            None => ("podCIDR", node.pod_cidrs.iter().filter(|cidr| cidr.as_ref().map_or(true, |prefix| !self.overlaps(prefix))).collect()),
        }
    }

    fn overlaps(&self, prefix: &IpNet) -> bool {
        self.all.cover(prefix).chain(self.all.children(prefix)).next().is_some()
    }
}

fn pod_prefixes<'a>(draft: &mut Draft<'a>, blocks: &Blocks<'a>, guard: &Guard, claims: &mut Claims) {
    let Draft { gateway, nodes, refusals, .. } = draft;
    for (node, subnets) in nodes {
        let (called, prefixes) = blocks.of(node);
        for prefix in prefixes {
            let prefix = match prefix {
                Ok(prefix) => *prefix,
                Err(bad) => {
                    let message =
                        format!("{called} {:?} of node {} is no prefix ({}): correct Node.spec.podCIDRs", bad.text, node.name, bad.why);
                    refusals.push(Refusal::new("BadPodCIDR", message));
                    continue;
                }
            };
            let what = format!("{called} {prefix} of node {}", node.name);
            if let Some((held, keep)) = guard.refuses(prefix, &gateway.name, Kind::Pod) {
                refusals.push(Refusal::new(guard::PREFIX_PROTECTED, guard::message(&what, prefix, held, keep, &gateway.name)));
                continue;
            }
            let owner = Owner { gateway: gateway.name.clone(), node: node.name.clone(), kind: Kind::Pod };
            match claims.claim(prefix, owner.clone()) {
                Ok(true) => subnets.push(prefix),
                Ok(false) => {}
                Err(conflict) => refusals.push(claimed_twice(what, &owner, &conflict)),
            }
        }
    }
}

// A pool whose nodes live in another pool's pod prefix: it cannot send that prefix into the tunnel, and nobody else is hurt.
fn addresses(draft: &mut Draft<'_>, claims: &Claims) {
    let Draft { gateway, nodes, refusals, .. } = draft;
    for (node, _) in nodes.iter() {
        for address in node.addresses() {
            let Some((held, owner)) = claims.holder(address).filter(|(_, owner)| owner.gateway != gateway.name) else { continue };
            let message = format!(
                "InternalIP {address} of node {} lies in {held} of node {} in Gateway {}: pods there cannot be reached from this pool, which needs that address outside of the tunnel; \
                 give the site another LAN prefix, or those pods another one",
                node.name, owner.node, owner.gateway
            );
            refusals.push(Refusal::new("NodeAddressInPodPrefix", message));
        }
    }
}

fn extra_prefixes(draft: &mut Draft<'_>, guard: &Guard, claims: &mut Claims) {
    let (extra, bad) = annotated(draft);
    draft.refusals.extend(bad);
    // Carried by the first elected node; with none elected there is nobody to carry it, and the conditions say that already.
    let Some(carrier) = draft.tunnel.elected.first().map(|e| e.node_name.clone()) else {
        return;
    };
    let Draft { gateway, nodes, refusals, .. } = draft;
    let Some((node, subnets)) = nodes.iter_mut().find(|(node, _)| node.name.as_str() == carrier) else {
        return;
    };
    for prefix in extra {
        let what = format!("prefix {prefix} of annotation {ANNOTATION_EXTRA_CIDRS}");
        if let Some((held, keep)) = guard.refuses(prefix, &gateway.name, Kind::Extra) {
            refusals.push(Refusal::new(guard::PREFIX_PROTECTED, guard::message(&what, prefix, held, keep, &gateway.name)));
            continue;
        }
        let owner = Owner { gateway: gateway.name.clone(), node: node.name.clone(), kind: Kind::Extra };
        match claims.claim(prefix, owner.clone()) {
            Ok(true) => subnets.push(prefix),
            Ok(false) => {}
            Err(conflict) => refusals.push(claimed_twice(what, &owner, &conflict)),
        }
    }
}

fn annotated(draft: &Draft<'_>) -> (Vec<IpNet>, Vec<Refusal>) {
    let annotations = draft.gateway.resource.metadata.annotations.as_ref();
    let text = annotations.and_then(|a| a.get(ANNOTATION_EXTRA_CIDRS)).map(String::as_str).unwrap_or_default();
    let (mut good, mut bad) = (Vec::new(), Vec::new());
    for item in text.split(',').filter(|item| !item.trim().is_empty()) {
        match parse_prefix(item) {
            Ok(prefix) => good.push(prefix),
            Err(e) => bad.push(Refusal::new(
                "BadAnnotation",
                format!("{:?} in annotation {ANNOTATION_EXTRA_CIDRS} is no prefix ({}): write prefixes such as 192.168.1.0/24, with commas between", e.text, e.why),
            )),
        }
    }
    (good, bad)
}

fn claimed_twice(what: String, claimant: &Owner, conflict: &Conflict) -> Refusal {
    let Conflict { held, owner } = conflict;
    let message = format!(
        "{what} overlaps {held} of node {} in Gateway {}, which keeps it: give one of the two another prefix; until then this one is left out",
        owner.node, owner.gateway
    );
    let refusal = Refusal::new("PrefixClaimedTwice", message);
    if owner.gateway == claimant.gateway {
        return refusal;
    }
    let note = format!(
        "{held} of node {} stays with this Gateway; Gateway {} claims it too ({what}) and does not get it: if it is meant to be there, take it away here",
        owner.node, claimant.gateway
    );
    refusal.told(Notice { to: owner.gateway.clone(), reason: "PrefixContested", note })
}
