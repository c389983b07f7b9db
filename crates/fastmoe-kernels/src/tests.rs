use super::*;
use ptxas::{Kernel as Compiled, kernels, refuse_local_memory};

#[path = "../build/ptxas.rs"]
mod ptxas;

const PTX: &str = "
.global .align 4 .b8 scale_launch[8] = {0, 1, 0, 0, 0, 16};
.global .align 4 .b8 scale_wide_launch[8] = {128};

.visible .entry scale(
	.param .align 8 .b8 scale_param_0[16]
)
.visible .entry scale_wide(
";

const LOG: &str = "ptxas info    : 16 bytes gmem, 16 bytes cmem[4]
ptxas info    : Compiling entry function 'scale_wide' for 'sm_80'
ptxas info    : Function properties for scale_wide
    48 bytes stack frame, 16 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 64 bytes smem, 368 bytes cmem[0]
ptxas info    : Compile time = 3.547 ms
ptxas info    : Compiling entry function 'scale' for 'sm_80'
ptxas info    : Function properties for scale
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers, used 0 barriers, 368 bytes cmem[0]
";

fn compiled(name: &str, threads: u32, shared_bytes: u32, registers: u32, local_bytes: u32) -> Compiled {
    Compiled { name: name.to_owned(), threads, shared_bytes, registers, local_bytes }
}

#[test]
fn launch_shapes_and_resources_are_read() {
    let expected = vec![compiled("scale", 256, 4096, 8, 0), compiled("scale_wide", 128, 0, 255, 96)];
    assert_eq!(kernels(PTX, LOG).unwrap(), expected);
}

#[test]
fn what_is_missing_is_named() {
    let error = kernels(".visible .entry lost(\n", LOG).unwrap_err();
    assert!(error.contains("lost has no launch shape"), "{error}");
    let error = kernels(PTX, "").unwrap_err();
    assert!(error.contains("nothing about scale"), "{error}");
    let error = kernels(PTX, &LOG.replace("Used 8 registers", "")).unwrap_err();
    assert!(error.contains("does not tell the registers and the local memory of scale:"), "{error}");
}

#[test]
fn local_memory_needs_a_reason() {
    let found = kernels(PTX, LOG).unwrap();
    assert!(refuse_local_memory(&found[..1], "").is_ok());
    for source in [
        "",
        "// local memory: scale_wide: ",
        "// local memory: scale: a table",
        "// local memory: scale_wide",
    ] {
        let error = refuse_local_memory(&found, source).unwrap_err();
        assert!(
            error.contains("scale_wide keeps 96 bytes a thread in local memory (255 registers)"),
            "{error}"
        );
    }
    assert!(
        refuse_local_memory(&found, "int x;\n  // local memory: scale_wide: a table of 12 entries\n").is_ok()
    );
}

fn image(family: &'static str, arch: Arch) -> Image {
    Image { family, arch, kernels: &[], zstd: &[] }
}

#[test]
fn a_device_gets_its_machine_code_or_ptx() {
    let images: Vec<Image> = Arch::ALL.map(|arch| image("sm80_gemm", arch)).into();
    let arch = |major, minor| choose(&images, "sm80_gemm", major, minor).map(|image| image.arch);
    for device in [(8, 0), (8, 6), (8, 9)] {
        assert_eq!(arch(device.0, device.1), Some(Arch::Sm80));
    }
    assert_eq!(arch(9, 0), Some(Arch::Sm90a));
    assert_eq!([arch(10, 0), arch(10, 3)], [Some(Arch::Sm100f); 2]);
    assert_eq!([arch(12, 0), arch(12, 1)], [Some(Arch::Sm120f); 2]);
    for device in [(8, 7), (8, 8), (11, 0), (13, 0)] {
        assert_eq!(arch(device.0, device.1), Some(Arch::Ptx80));
    }
    assert_eq!([arch(7, 5), arch(6, 1)], [None; 2]);
    assert!(choose(&images, "sm80_gem", 8, 0).is_none());
}

#[test]
fn what_a_build_left_out_is_not_replaced_by_other_machine_code() {
    let images = [image("topk", Arch::Sm80), image("topk", Arch::Sm90a)];
    assert_eq!(choose(&images, "topk", 9, 0).unwrap().arch, Arch::Sm90a);
    assert!(choose(&images, "topk", 10, 0).is_none());
    let images = [image("topk", Arch::Sm80), image("topk", Arch::Ptx80)];
    assert_eq!(choose(&images, "topk", 9, 0).unwrap().arch, Arch::Ptx80);
}

#[test]
fn families_are_made_for_the_targets_in_their_names() {
    let archs = |family: &str| Arch::ALL.into_iter().filter(|arch| arch.is_for(family)).collect::<Vec<_>>();
    assert_eq!(archs("topk"), Arch::ALL);
    assert_eq!(archs("sm80_grouped_gemm"), Arch::ALL);
    assert_eq!(archs("sm90_grouped_gemm"), [Arch::Sm90a]);
    assert_eq!(archs("sm100_grouped_gemm"), [Arch::Sm100f]);
    for arch in Arch::ALL {
        assert_eq!(Arch::from_name(arch.name()), Some(arch));
    }
    assert_eq!(Arch::from_name("90"), None);
}

#[test]
fn images_inflate() {
    let original: Vec<u8> = (0..100_000u32).flat_map(|i| (i / 7).to_le_bytes()).collect();
    let zstd = zstd::bulk::compress(&original, 19).unwrap().leak();
    let packed = Image { zstd, ..image("topk", Arch::Sm80) };
    assert_eq!(packed.inflate(), original);
    assert_eq!(packed.compressed_bytes(), zstd.len());
}

/// Holds for a build without kernels as well, which has no images.
#[test]
fn the_images_of_this_build_are_what_they_claim() {
    for image in images() {
        let inflated = image.inflate();
        match image.arch {
            Arch::Ptx80 => {
                assert_eq!(inflated.iter().position(|&byte| byte == 0), Some(inflated.len() - 1));
                assert!(inflated.windows(13).any(|text| text == b".target sm_80"));
            }
            // EM_CUDA in the header of a 64-bit ELF file.
            _ => assert_eq!((&inflated[..5], inflated[18]), (&b"\x7fELF\x02"[..], 190), "{}", image.family),
        }
        for kernel in image.kernels {
            let name = kernel.name.as_bytes();
            assert!(inflated.windows(name.len()).any(|text| text == name), "{}", kernel.name);
            assert!((32..=1024).contains(&kernel.threads) && kernel.threads % 32 == 0, "{kernel:?}");
            assert!(kernel.registers * kernel.threads <= 65536, "{kernel:?}");
            // A device that cannot give a kernel its shared memory refuses to load it, and with it all others; the least
            // of an 8.x is that of 8.6, of a 12.x that of all.
            let most = if matches!(image.arch, Arch::Sm90a | Arch::Sm100f) { 227 } else { 99 };
            assert!(kernel.shared_bytes <= most << 10, "{kernel:?} for {:?}", image.arch);
        }
    }
}
