//! Ownership of prefixes: a trie of all prefixes claimed so far.
//!
//! The first claim wins; the caller submits claims in the order of seniority. A rejected claim returns
//! the conflicting owner.

use std::net::IpAddr;

use ipnet::IpNet;
use prefix_trie::joint::JointPrefixMap;

use super::facts::{GatewayName, NodeName};

/// Source of a claim.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// A prefix of a node's pods.
    Pod,
    /// A prefix from the Gateway's annotation.
    Extra,
}

/// Owner of a prefix.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Owner {
    /// Gateway of the pool.
    pub(crate) gateway: GatewayName,
    /// Node that carries the prefix.
    pub(crate) node: NodeName,
    /// Source of the claim.
    pub(crate) kind: Kind,
}

/// An existing claim that excludes a new one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Conflict {
    /// Claimed prefix that overlaps the new one.
    pub(crate) held: IpNet,
    /// Owner of that prefix.
    pub(crate) owner: Owner,
}

/// All prefixes claimed so far.
#[derive(Default)]
pub(crate) struct Claims {
    held: JointPrefixMap<IpNet, Owner>,
}

impl Claims {
    /// Claims `prefix` for `owner`. Returns `Ok(false)` if the same pool already holds the same prefix.
    pub(crate) fn claim(&mut self, prefix: IpNet, owner: Owner) -> Result<bool, Conflict> {
        let overlapping = self.held.cover(&prefix).chain(self.held.children(&prefix));
        let conflict = overlapping
            .filter(|(held, other)| Self::collide(prefix, &owner, *held, other))
            // The smallest by name: the message must not depend on the order in which the trie iterates.
            .min_by(|a, b| (&a.1.gateway, a.0).cmp(&(&b.1.gateway, b.0)))
            .map(|(held, other)| Conflict { held, owner: other.clone() });
        if let Some(conflict) = conflict {
            return Err(conflict);
        }
        if self.held.get(&prefix).is_some() {
            return Ok(false);
        }
        self.held.insert(prefix, owner);
        Ok(true)
    }

    /// Returns the longest pod prefix that contains `address`, and its owner.
    pub(crate) fn holder(&self, address: IpAddr) -> Option<(IpNet, &Owner)> {
        self.held.cover(&IpNet::from(address)).filter(|(_, owner)| owner.kind == Kind::Pod).last()
    }

    // Within one pool, an extra prefix may contain a node's prefix or lie inside it: the longest match decides.
    fn collide(prefix: IpNet, owner: &Owner, held: IpNet, other: &Owner) -> bool {
        if owner.gateway != other.gateway {
            return true;
        }
        if owner.node == other.node && prefix == held {
            return false;
        }
        owner.kind == Kind::Pod && other.kind == Kind::Pod
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn owner(gateway: &str, node: &str, kind: Kind) -> Owner {
        Owner { gateway: gateway.into(), node: node.into(), kind }
    }

    fn net(text: &str) -> IpNet {
        text.parse().expect("a prefix written in a test")
    }

    #[test]
    fn overlapping_prefixes_of_another_pool_are_refused() {
        let mut claims = Claims::default();
        assert_eq!(claims.claim(net("10.1.0.0/16"), owner("a", "a1", Kind::Pod)), Ok(true));
        let narrower =
            claims.claim(net("10.1.2.0/24"), owner("b", "b1", Kind::Pod)).expect_err("it lies inside 10.1.0.0/16");
        assert_eq!(narrower.held, net("10.1.0.0/16"));
        let wider =
            claims.claim(net("10.0.0.0/8"), owner("b", "b1", Kind::Extra)).expect_err("it contains 10.1.0.0/16");
        assert_eq!(wider.owner.gateway, "a".into());
        assert_eq!(claims.claim(net("10.2.0.0/16"), owner("b", "b1", Kind::Pod)), Ok(true));
        assert_eq!(claims.claim(net("fd00::/64"), owner("b", "b1", Kind::Pod)), Ok(true));
    }

    #[test]
    fn pool_may_nest_extra_prefixes_but_not_pod_prefixes() {
        let mut claims = Claims::default();
        assert_eq!(claims.claim(net("10.1.1.0/24"), owner("a", "a1", Kind::Pod)), Ok(true));
        assert!(claims.claim(net("10.1.1.0/24"), owner("a", "a2", Kind::Pod)).is_err());
        assert_eq!(claims.claim(net("10.1.0.0/16"), owner("a", "a1", Kind::Extra)), Ok(true));
        assert_eq!(claims.claim(net("10.1.1.0/24"), owner("a", "a2", Kind::Extra)), Ok(false));
    }
}
