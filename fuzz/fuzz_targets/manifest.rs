//! Descriptions that come with an archive, an image or a peer: of a substrate, of a machine, of
//! an image; and what a site asks for of a substrate. Parsed or refused; what is taken keeps its bounds and survives being written again.
#![no_main]

use std::path::Path;

use godwit_image::Image;
use godwit_qemu::Manifest;
use godwit_substrate::{Substrate, TakerMsg};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(machine) = Manifest::parse(data) {
        let text = machine.canonical();
        let again = Manifest::parse(text.as_bytes());
        // The canonical text can be longer than what was taken only where it escapes.
        if text.len() <= Manifest::MAX_BYTES {
            assert_eq!(again.as_ref().ok(), Some(&machine));
        }
        assert!(machine.check(&machine).is_ok());
        let mut other = machine.clone();
        other.vcpus ^= 1;
        assert!(machine.check(&other).is_err());
    }
    if let Ok(substrate) = Substrate::parse(data, "the input") {
        let text = serde_json::to_vec(&substrate).expect("what was read can be written");
        let again = Substrate::parse(&text, "the input again").expect("and read again");
        assert_eq!(again, substrate);
        assert_eq!(again.content(), substrate.content());
    }
    if let Some((&tag, rest)) = data.split_first()
        && let Some((fixed, rest)) = TakerMsg::fixed(tag).and_then(|n| rest.split_at_checked(n))
        && let Ok(n) = TakerMsg::hashes(tag, fixed)
        && let Some(hashes) = rest.get(..n)
    {
        let message = TakerMsg::decode(tag, fixed, hashes).expect("its parts fit");
        assert_eq!(message.encode(), data[..1 + fixed.len() + n]);
    }
    if let Ok(image) = Image::parse(data, Path::new("/images/x")) {
        for file in [Some(image.kernel_path()), image.initrd_path(), image.disk_path()] {
            let Some(file) = file else { continue };
            assert_eq!(file.parent(), Some(image.dir()), "{}", file.display());
        }
    }
});
