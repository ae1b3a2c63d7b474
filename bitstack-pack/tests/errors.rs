//! What bad shapes, lengths and bytes are answered with.
#![expect(clippy::print_stdout, reason = "a test that cannot run here says so")]

use bitstack_pack::{Isa, PackError, SignMatrix, SignView, pack_into, packed_len, row_bytes};

#[test]
fn rows_are_padded_to_whole_bytes() {
    assert_eq!([0, 1, 7, 8, 9, 16, 17].map(row_bytes), [0, 1, 1, 1, 2, 2, 3]);
    assert_eq!(packed_len(3, 9), Ok(6));
    assert_eq!(packed_len(usize::MAX, 0), Ok(0));
    assert_eq!(row_bytes(usize::MAX), usize::MAX / 8 + 1);
}

#[test]
fn a_shape_whose_size_overflows_is_rejected() {
    for (rows, cols) in [(usize::MAX, 9), (usize::MAX, 1), (1 << (usize::BITS - 2), 17)] {
        let expected = PackError::TooLarge { rows, cols };
        assert_eq!(packed_len(rows, cols), Err(expected.clone()));
        assert_eq!(SignView::new(rows, cols, &[]), Err(expected.clone()));
        assert_eq!(SignMatrix::from_bytes(rows, cols, vec![]), Err(expected.clone()));
        assert_eq!(SignMatrix::from_f32(rows, cols, &[]), Err(expected.clone()));
        assert_eq!(pack_into(rows, cols, &[], &mut []), Err(expected));
    }
}

#[test]
fn a_claimed_size_is_not_allocated() {
    // 2^28 values (32 MiB of bits) in an address space of 32 bits, 2^60 in one of 64.
    let (rows, cols) = (1 << (usize::BITS - 14), 1 << 10);
    assert!(matches!(
        SignMatrix::from_f32(rows, cols, &[1.0]),
        Err(PackError::Length { what: "values", actual: 1, .. })
    ));
    assert!(matches!(SignView::new(rows, cols, &[1]), Err(PackError::Length { what: "bytes", actual: 1, .. })));
}

#[test]
fn lengths_other_than_the_shape_demands_are_rejected() {
    let length = |what, expected, actual| Err(PackError::Length { what, rows: 2, cols: 9, expected, actual });
    for len in [0, 17, 19] {
        assert_eq!(SignMatrix::from_f32(2, 9, &vec![1.0; len]), length("values", 18, len).map(|()| unreachable!()));
        assert_eq!(pack_into(2, 9, &vec![1.0; len], &mut [0; 4]), length("values", 18, len));
        let signs = SignMatrix::from_f32(2, 9, &[1.0; 18]).unwrap();
        assert_eq!(signs.view().unpack_into(&mut vec![0.0; len]), length("values", 18, len));
    }
    for len in [0, 3, 5] {
        assert_eq!(SignView::new(2, 9, &vec![0; len]).map(|_| ()), length("bytes", 4, len));
        assert_eq!(SignMatrix::from_bytes(2, 9, vec![0; len]).map(|_| ()), length("bytes", 4, len));
        let mut bytes = vec![0x77; len];
        assert_eq!(pack_into(2, 9, &[1.0; 18], &mut bytes), length("bytes", 4, len));
        assert_eq!(bytes, vec![0x77; len], "the output is untouched after an error");
    }
}

#[test]
fn every_bit_beyond_the_last_column_is_rejected() {
    for cols in 1..=16 {
        for row in 0..3 {
            for bit in 0..8 * row_bytes(cols) {
                let mut bytes = vec![0; 3 * row_bytes(cols)];
                bytes[row * row_bytes(cols) + bit / 8] = 1 << (bit % 8);
                let result = SignView::new(3, cols, &bytes).map(|view| view.get(row, bit));
                assert_eq!(result, if bit < cols { Ok(1.0) } else { Err(PackError::TailBits { row, cols }) });
            }
        }
    }
}

#[test]
fn messages_name_the_shape_and_the_numbers() {
    let messages = [
        (SignView::new(2, 9, &[0]).unwrap_err(), "a 2 x 9 sign matrix needs 4 bytes, got 1"),
        (
            SignView::new(1, 3, &[8]).unwrap_err(),
            "row 0 of a sign matrix with 3 columns has bits set beyond its last column",
        ),
        (packed_len(usize::MAX, 9).unwrap_err(), &format!("a {} x 9 sign matrix does not fit in memory", usize::MAX)),
    ];
    for (error, message) in messages {
        assert_eq!(error.to_string(), message);
    }
}

#[test]
#[should_panic(expected = "row 2 of a sign matrix with 2 rows")]
fn a_row_beyond_the_last_panics() {
    SignMatrix::from_f32(2, 3, &[1.0; 6]).unwrap().view().row(2);
}

#[test]
#[should_panic(expected = "of a sign matrix with 2 rows")]
fn a_row_whose_offset_wraps_around_panics() {
    // 2^63 rows of two bytes would be offset 0 again where overflow is not checked.
    SignMatrix::from_f32(2, 9, &[1.0; 18]).unwrap().view().row(1 << (usize::BITS - 1));
}

#[test]
#[should_panic(expected = "column 3 of a sign matrix with 3 columns")]
fn a_column_beyond_the_last_panics_though_its_byte_exists() {
    SignMatrix::from_f32(2, 3, &[1.0; 6]).unwrap().view().get(0, 3);
}

#[test]
#[should_panic(expected = "number of values")]
fn applying_a_row_to_another_length_panics() {
    SignMatrix::from_f32(1, 3, &[1.0; 3]).unwrap().view().apply_row(0, &mut [1.0; 4]);
}

#[test]
fn a_level_that_the_cpu_lacks_panics_and_is_not_run() {
    let Some(isa) = Isa::ALL.into_iter().find(|isa| !isa.is_available()) else {
        println!("skipped: this CPU has every instruction set");
        return;
    };
    let call = || bitstack_pack::pack_into_at(isa, 1, 8, &[1.0; 8], &mut [0]);
    assert!(std::panic::catch_unwind(call).is_err());
}
