//! Who gets a certificate of the proxies' CA: the agent on the node that it is for, and nobody else.

use anyhow::{Context, ensure};
use k8s_openapi::{
    ByteString,
    api::{certificates::v1::CertificateSigningRequest, events::v1::Event},
};
use kube::{
    Api,
    api::{ListParams, PostParams},
};
use raven_api::proxy::{SIGNER_CLIENT, SIGNER_SERVER};
use raven_tests::{Lab, eventually, privileged};
use rcgen::{CertificateParams, KeyPair};

use crate::{Running, SOON};

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_asks_for_another_nodes_certificate_is_denied_with_an_event() {
    if !privileged("an_agent_that_asks_for_another_nodes_certificate_is_denied_with_an_event") {
        return;
    }
    let running = Running::of(Lab::builder()).await.expect("the lab starts");
    let lab = &running.lab;
    // As the agent of x-b, with its own token: what somebody has who stole the box.
    let kubeconfig = running.check(lab.cluster().agent_kubeconfig(lab, lab.node("x-b")).await);
    let text =
        std::fs::read_to_string(&kubeconfig).expect("a kubeconfig").replace("198.51.100.10", &lab.host_link.control_plane.to_string());
    std::fs::write(&kubeconfig, text).expect("written");
    let stolen: Api<CertificateSigningRequest> = Api::all(raven_tests::kubernetes::client(&kubeconfig).await.expect("a client"));
    for (name, signer, usage, reason) in
        [("x-a", SIGNER_CLIENT, "client auth", "NamesNotAllowed"), ("198.51.100.10", SIGNER_SERVER, "server auth", "NotElected")]
    {
        let key = KeyPair::generate().expect("a key");
        let params = CertificateParams::new(vec![name.to_owned()]).expect("a name");
        let pem = params.serialize_request(&key).expect("a request").pem().expect("PEM");
        let request = serde_json::from_value(serde_json::json!({
            "metadata": { "generateName": "stolen-" },
            "spec": { "request": ByteString(pem.into_bytes()), "signerName": signer, "usages": ["digital signature", usage] },
        }));
        let made = stolen.create(&PostParams::default(), &request.expect("a request")).await.expect("anybody may ask");
        let made = made.metadata.name.expect("a name");
        let denied = || async {
            let status = stolen.get(&made).await?.status.context("nobody has decided")?;
            ensure!(status.certificate.is_none(), "it was signed");
            let condition = status.conditions.into_iter().flatten().find(|c| c.type_ == "Denied").context("not denied yet")?;
            ensure!(condition.reason.as_deref() == Some(reason), "{condition:?}");
            Ok(())
        };
        running.check(eventually(SOON, &format!("the request for {name} is denied"), denied).await);
        let events: Api<Event> = Api::all(lab.cluster().client());
        let told = || async {
            let events = events.list(&ListParams::default()).await?;
            let event = events.items.into_iter().find(|e| e.regarding.as_ref().and_then(|r| r.name.as_deref()) == Some(&made));
            let event = event.context("no Event about it")?;
            ensure!(event.reason.as_deref() == Some(reason) && event.note.is_some_and(|n| n.contains("x-b")), "another Event");
            Ok(())
        };
        running.check(eventually(SOON, "an Event says so", told).await);
    }
}
