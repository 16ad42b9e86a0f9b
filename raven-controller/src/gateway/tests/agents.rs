//! Gateway nodes on which no agent works are replaced.

use raven_api::condition::ConditionType;

use super::build::*;
use super::cases::two_pools;
use crate::gateway::events::changes;

fn ready(cluster: &Cluster) -> (String, String, String) {
    let status = cluster.resource("edge").status.as_ref().expect("applied");
    let ready = status.conditions.iter().find(|c| c.type_ == ConditionType::Ready.as_str()).expect("always present");
    (ready.status.clone(), ready.reason.clone(), ready.message.clone())
}

#[test]
fn node_without_an_agent_is_replaced_by_one_with_an_agent() {
    let cluster = two_pools().apply(1);
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let before = cluster.resource("edge").status.clone();
    let cluster = cluster.without_agent("e1").apply(2);
    assert_eq!(cluster.tunnel("edge"), ["e2"]);
    assert_eq!(ready(&cluster).0, "True");
    let after = cluster.resource("edge").status.clone().expect("applied");
    let notes: Vec<String> =
        changes(&cluster.0, &"edge".into(), before.as_ref(), &after).into_iter().map(|c| c.note).collect();
    let expected = "e2 replaces e1 (its agent is not Ready: kubectl describe pods -A -l app.kubernetes.io/name=raven-agent --field-selector spec.nodeName=e1)";
    assert!(notes.iter().any(|note| note.contains(expected)), "{notes:?}");
}

#[test]
fn elected_node_stays_if_no_candidate_has_an_agent_and_the_gateway_is_not_ready() {
    let cluster = two_pools().apply(1).without_agent("e1").without_agent("e2").apply(2);
    assert_eq!(cluster.tunnel("edge"), ["e1"]);
    let (status, reason, message) = ready(&cluster);
    assert_eq!((status.as_str(), reason.as_str()), ("False", "AgentNotReady"), "{message}");
    assert!(message.contains("the agent of gateway node e1 is not Ready"), "{message}");
}
