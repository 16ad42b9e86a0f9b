//! Decides which certificate requests are granted: those of an agent for the node that it runs on. No I/O.
//!
//! The requester's token proves the node: the kubelet binds it to the agent's Pod, and the API server adds name and
//! UID of the Pod's node to the request (KEP-4193; Kubernetes 1.30 and later). No value chosen by the agent is
//! trusted. The certificate is bound to the UID of the Node, so deleting the Node revokes it, even if a later Node has
//! the same name.

use std::collections::{BTreeMap, BTreeSet};

use jiff::SignedDuration;
use k8s_openapi::api::certificates::v1::CertificateSigningRequestSpec;
use raven_api::{
    AGENT_SERVICE_ACCOUNT, Gateway,
    gateway::EndpointType,
    proxy::{CONFIG_HOSTNAME, SIGNER_CLIENT, SIGNER_SERVER, canonical_host},
};
use rcgen::{CertificateSigningRequestParams, PublicKey, SanType};

/// Key of the node's name in the request's extra user information.
const NODE_CLAIM: &str = "authentication.kubernetes.io/node-name";
/// Key of the node's UID in the request's extra user information.
const UID_CLAIM: &str = "authentication.kubernetes.io/node-uid";
/// Maximum validity of a certificate.
const MAX_LIFE: SignedDuration = SignedDuration::from_hours(90 * 24);

/// The signers of the controller.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Signer {
    /// Signs certificates of proxies that dial.
    Client,
    /// Signs certificates of proxies that are dialled.
    Server,
}

impl Signer {
    /// Returns the signer of this name.
    pub(crate) fn of(name: &str) -> Option<Self> {
        match name {
            SIGNER_CLIENT => Some(Self::Client),
            SIGNER_SERVER => Some(Self::Server),
            _ => None,
        }
    }

    fn usage(self) -> &'static str {
        match self {
            Self::Client => "client auth",
            Self::Server => "server auth",
        }
    }
}

/// A granted request.
#[derive(Debug)]
pub(crate) struct Granted {
    /// Name of the node.
    pub(crate) node: String,
    /// UID of the Node.
    pub(crate) uid: String,
    /// Host names and addresses of the certificate.
    pub(crate) names: Vec<String>,
    /// Signer of the certificate.
    pub(crate) signer: Signer,
    /// Public key of the requester.
    pub(crate) public_key: PublicKey,
    /// Validity of the certificate.
    pub(crate) life: SignedDuration,
}

/// Reason why a request is denied, for the condition and the Event.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The requester is not an agent.
    #[error("certificates are issued to agents only ({expected}), not to {username}")]
    NotAnAgent {
        /// User name of the requester.
        username: String,
        /// User name of the agents.
        expected: String,
    },
    /// The token is not bound to a Pod on a node.
    #[error(
        "the requester's token is not bound to a node: agents must use the token that the kubelet mounts into their Pod"
    )]
    NoNode,
    /// The node does not exist.
    #[error("node {0} does not exist")]
    NodeGone(String),
    /// The token is bound to an earlier Node of the same name.
    #[error(
        "the requester's token is bound to an earlier Node {0}, which was deleted; its certificates are revoked. If the machine is the same, \
         delete the agent's Pod there: its successor gets a new token"
    )]
    NodeReplaced(String),
    /// The request is malformed, or its signature is invalid.
    #[error("invalid certificate request: {0}")]
    Malformed(String),
    /// The request contains names that do not belong to the node.
    #[error("the agent on node {node} may request a certificate for {allowed}, not for {requested}")]
    Names {
        /// Node of the agent.
        node: String,
        /// Names that the node may have, comma-separated.
        allowed: String,
        /// Names in the request, comma-separated.
        requested: String,
    },
    /// The usages do not match the signer.
    #[error("usages must be `digital signature` and `{required}`, not {requested}")]
    Usages {
        /// Required usage, in addition to `digital signature`.
        required: &'static str,
        /// Usages in the request, comma-separated.
        requested: String,
    },
    /// A server certificate was requested for a node that is not elected.
    #[error("node {0} is not an elected proxy node of an exposed Gateway")]
    NotElected(String),
}

impl Refusal {
    /// Returns the reason in CamelCase; part of the API.
    pub(crate) fn reason(&self) -> &'static str {
        match self {
            Self::NotAnAgent { .. } => "NotAnAgent",
            Self::NoNode => "TokenNotBound",
            Self::NodeGone(_) => "NodeGone",
            Self::NodeReplaced(_) => "NodeReplaced",
            Self::Malformed(_) => "Malformed",
            Self::Names { .. } => "NamesNotAllowed",
            Self::Usages { .. } => "UsagesNotAllowed",
            Self::NotElected(_) => "NotElected",
        }
    }
}

/// Facts about the cluster that a decision needs.
#[derive(Clone, Debug)]
pub(crate) struct Facts<'a> {
    /// Namespace of the agents' ServiceAccount.
    pub(crate) namespace: &'a str,
    /// UIDs of all Nodes, by name.
    pub(crate) nodes: &'a BTreeMap<String, String>,
    /// All Gateways, with their status.
    pub(crate) gateways: &'a [Gateway],
}

/// Grants or denies a request.
pub(crate) fn evaluate(
    request: &CertificateSigningRequestSpec,
    signer: Signer,
    facts: &Facts<'_>,
) -> Result<Granted, Refusal> {
    let (node, uid) = requester(request, facts)?;
    let allowed = allowed(&node, signer, facts)?;
    usages(request, signer)?;
    let (names, public_key) = parse_request(&request.request.0)?;
    let requested: BTreeSet<&String> = names.iter().collect();
    if requested.is_empty() || !requested.iter().all(|name| allowed.contains(*name)) {
        let list = |names: &mut dyn Iterator<Item = &String>| names.map(String::as_str).collect::<Vec<_>>().join(", ");
        let requested = if requested.is_empty() { "no name".to_owned() } else { list(&mut requested.into_iter()) };
        return Err(Refusal::Names { node, allowed: list(&mut allowed.iter()), requested });
    }
    let life = request.expiration_seconds.map_or(MAX_LIFE, |s| SignedDuration::from_secs(s.into())).min(MAX_LIFE);
    Ok(Granted { node, uid, names, signer, public_key, life })
}

fn requester(request: &CertificateSigningRequestSpec, facts: &Facts<'_>) -> Result<(String, String), Refusal> {
    let expected = format!("system:serviceaccount:{}:{AGENT_SERVICE_ACCOUNT}", facts.namespace);
    let username = request.username.clone().unwrap_or_default();
    if username != expected {
        return Err(Refusal::NotAnAgent { username, expected });
    }
    let claim = |name: &str| request.extra.as_ref()?.get(name)?.first().filter(|value| !value.is_empty()).cloned();
    let node = claim(NODE_CLAIM).ok_or(Refusal::NoNode)?;
    let Some(uid) = facts.nodes.get(&node) else { return Err(Refusal::NodeGone(node)) };
    match claim(UID_CLAIM) {
        Some(claimed) if claimed == *uid => Ok((node, claimed)),
        Some(_) => Err(Refusal::NodeReplaced(node)),
        // The Node did not exist when the token was issued.
        None => Err(Refusal::NoNode),
    }
}

fn allowed(node: &str, signer: Signer, facts: &Facts<'_>) -> Result<BTreeSet<String>, Refusal> {
    if signer == Signer::Client {
        return Ok(BTreeSet::from([node.to_owned()]));
    }
    let mut names = BTreeSet::new();
    for gateway in facts.gateways.iter().filter(|g| g.is_exposed()) {
        let Some(status) = &gateway.status else { continue };
        let elected = status.active_endpoints.iter().filter(|e| e.type_ == EndpointType::Proxy && e.node_name == node);
        for endpoint in elected {
            names.extend(endpoint.public_ip.as_deref().filter(|ip| !ip.is_empty()).map(canonical_host));
            names.extend(endpoint.config.get(CONFIG_HOSTNAME).cloned());
            names.extend(status.nodes.iter().filter(|n| n.node_name == node).map(|n| n.private_ip.clone()));
        }
    }
    if names.is_empty() { Err(Refusal::NotElected(node.to_owned())) } else { Ok(names) }
}

fn usages(request: &CertificateSigningRequestSpec, signer: Signer) -> Result<(), Refusal> {
    let requested: BTreeSet<&str> = request.usages.iter().flatten().map(String::as_str).collect();
    let required = BTreeSet::from(["digital signature", signer.usage()]);
    if requested == required {
        return Ok(());
    }
    Err(Refusal::Usages { required: signer.usage(), requested: requested.into_iter().collect::<Vec<_>>().join(", ") })
}

/// Parses a request and verifies its signature. Returns the requested names and the public key.
fn parse_request(pem: &[u8]) -> Result<(Vec<String>, PublicKey), Refusal> {
    let malformed = |e: &dyn std::fmt::Display| Refusal::Malformed(e.to_string());
    let text = std::str::from_utf8(pem).map_err(|e| malformed(&e))?;
    let request = CertificateSigningRequestParams::from_pem(text).map_err(|e| malformed(&e))?;
    let names = request.params.subject_alt_names.iter().map(|name| match name {
        SanType::DnsName(name) => Ok(name.as_str().to_owned()),
        SanType::IpAddress(ip) => Ok(ip.to_string()),
        _ => Err(Refusal::Malformed(
            "a subject alternative name that is neither a DNS name nor an IP address".to_owned(),
        )),
    });
    Ok((names.collect::<Result<_, _>>()?, request.public_key))
}

#[cfg(test)]
mod tests {
    use k8s_openapi::ByteString;
    use raven_api::{
        GatewaySpec, GatewayStatus,
        gateway::{Endpoint, ExposeType, NodeInfo},
    };
    use rcgen::{CertificateParams, KeyPair};

    use super::*;

    fn request(names: &[&str], usage: &str, node: Option<&str>) -> CertificateSigningRequestSpec {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(names.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>()).expect("names");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
        CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            username: Some("system:serviceaccount:kube-system:raven-agent-account".to_owned()),
            usages: Some(vec!["digital signature".to_owned(), usage.to_owned()]),
            extra: node.map(|node| {
                BTreeMap::from([
                    (NODE_CLAIM.to_owned(), vec![node.to_owned()]),
                    (UID_CLAIM.to_owned(), vec![format!("uid-of-{node}")]),
                ])
            }),
            ..CertificateSigningRequestSpec::default()
        }
    }

    fn evaluated(request: &CertificateSigningRequestSpec, signer: Signer) -> Result<Granted, Refusal> {
        evaluated_at("198.51.100.10", request, signer)
    }

    fn evaluated_at(
        public_ip: &str,
        request: &CertificateSigningRequestSpec,
        signer: Signer,
    ) -> Result<Granted, Refusal> {
        let endpoint = Endpoint {
            node_name: "cloud-a".to_owned(),
            type_: EndpointType::Proxy,
            public_ip: Some(public_ip.to_owned()),
            ..Endpoint::default()
        };
        let mut gateway =
            Gateway::new("cloud", GatewaySpec { expose_type: ExposeType::PublicIP, ..GatewaySpec::default() });
        let info =
            NodeInfo { node_name: "cloud-a".to_owned(), private_ip: "10.0.0.11".to_owned(), ..NodeInfo::default() };
        gateway.status =
            Some(GatewayStatus { nodes: vec![info], active_endpoints: vec![endpoint], ..GatewayStatus::default() });
        let nodes = ["cloud-a", "x-a", "x-b"].map(|node| (node.to_owned(), format!("uid-of-{node}"))).into();
        evaluate(request, signer, &Facts { namespace: "kube-system", nodes: &nodes, gateways: &[gateway] })
    }

    fn refused(request: &CertificateSigningRequestSpec, signer: Signer) -> &'static str {
        evaluated(request, signer).expect_err("it is denied").reason()
    }

    #[test]
    fn agent_gets_a_certificate_for_its_own_node_only() {
        let own = evaluated(&request(&["x-a"], "client auth", Some("x-a")), Signer::Client).expect("granted");
        assert_eq!((own.node.as_str(), own.names), ("x-a", vec!["x-a".to_owned()]));
        assert_eq!(refused(&request(&["x-b"], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&["x-a", "x-b"], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&[], "client auth", Some("x-a")), Signer::Client), "NamesNotAllowed");
        assert_eq!(refused(&request(&["gone"], "client auth", Some("gone")), Signer::Client), "NodeGone");
    }

    #[test]
    fn requester_without_a_bound_token_is_denied() {
        assert_eq!(refused(&request(&["x-a"], "client auth", None), Signer::Client), "TokenNotBound");
        let mut other = request(&["x-a"], "client auth", Some("x-a"));
        other.username = Some("system:serviceaccount:default:x".to_owned());
        assert_eq!(refused(&other, Signer::Client), "NotAnAgent");
    }

    #[test]
    fn token_of_an_earlier_node_of_the_same_name_is_denied() {
        let mut earlier = request(&["x-a"], "client auth", Some("x-a"));
        let mut claim = |uid: Option<&str>| {
            let extra = earlier.extra.as_mut().expect("claims");
            match uid {
                Some(uid) => drop(extra.insert(UID_CLAIM.to_owned(), vec![uid.to_owned()])),
                None => drop(extra.remove(UID_CLAIM)),
            }
            evaluated(&earlier, Signer::Client).map(|granted| granted.uid).map_err(|refusal| refusal.reason())
        };
        assert_eq!(claim(Some("uid-of-another-x-a")), Err("NodeReplaced"));
        assert_eq!(claim(None), Err("TokenNotBound"));
        assert_eq!(claim(Some("uid-of-x-a")), Ok("uid-of-x-a".to_owned()));
    }

    #[test]
    fn server_certificate_requires_election_and_own_addresses() {
        for name in ["198.51.100.10", "10.0.0.11"] {
            evaluated(&request(&[name], "server auth", Some("cloud-a")), Signer::Server).expect("granted");
        }
        assert_eq!(
            refused(&request(&["198.51.100.99"], "server auth", Some("cloud-a")), Signer::Server),
            "NamesNotAllowed"
        );
        assert_eq!(refused(&request(&["x-a"], "server auth", Some("x-a")), Signer::Server), "NotElected");
        assert_eq!(
            refused(&request(&["198.51.100.10"], "client auth", Some("cloud-a")), Signer::Server),
            "UsagesNotAllowed"
        );
    }

    #[test]
    fn addresses_are_compared_in_canonical_form() {
        let request = request(&["2001:db8::1"], "server auth", Some("cloud-a"));
        for written in ["2001:db8::1", "2001:DB8::1", "2001:db8:0::1", "2001:0db8:0000:0000:0000:0000:0000:0001"] {
            let granted = evaluated_at(written, &request, Signer::Server)
                .unwrap_or_else(|refusal| panic!("{written}: {refusal}"));
            assert_eq!(granted.names, ["2001:db8::1"]);
        }
        assert_eq!(
            evaluated_at("2001:db8::2", &request, Signer::Server).expect_err("an address of another node").reason(),
            "NamesNotAllowed"
        );
    }

    #[test]
    fn malformed_or_forged_request_is_denied() {
        let mut broken = request(&["x-a"], "client auth", Some("x-a"));
        broken.request = ByteString(b"hello".to_vec());
        assert_eq!(refused(&broken, Signer::Client), "Malformed");
        let mut forged = request(&["x-a"], "client auth", Some("x-a"));
        let at = forged.request.0.len() - 60;
        forged.request.0[at] = if forged.request.0[at] == b'A' { b'B' } else { b'A' };
        assert_eq!(refused(&forged, Signer::Client), "Malformed");
    }
}
